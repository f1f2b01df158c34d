"""Values of a config.json, checked one by one: what is no number, or no switch, is refused by its name."""

import math
from collections.abc import Mapping
from typing import Any


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a number of config.json; the default, if there is one, where it is missing or null."""
    value = raw.get(name)
    if value is None:
        if default is not None:
            return default
        raise ValueError(
            f"config.json: key {name!r} is missing; a decoder cannot be built without it; "
            "take the config.json that belongs to the weights."
        )
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} is no number; write it as one, without quotes.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"config.json: {name} has {len(str(value))} digits; correct it.") from None


def positive(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a positive, finite number of config.json, as `number` does."""
    value = number(raw, name, default)
    if not 0 < value < math.inf:
        raise ValueError(f"config.json: {name}={value!r} must be a positive number; take the file of the weights.")
    return value


def integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns a whole number of config.json, as `number` does."""
    value = float(number(raw, name, default))
    if not value.is_integer() or abs(value) > 2**53:
        raise ValueError(f"config.json: {name}={raw[name]!r} is no whole number; take the file of the weights.")
    return int(value)


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """Returns a switch of config.json, off where it is missing or null."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} is neither true nor false; correct it.")
    return bool(value)
