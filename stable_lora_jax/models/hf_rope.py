"""The rotary embedding in a config.json: in two places before transformers 5, one since, nested where layers differ."""

import math
from collections.abc import Mapping
from typing import Any

from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.hf_values import flag, integer, number, positive
from stable_lora_jax.models.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

_THETA = {"smollm3": 2_000_000.0, "gemma3_text": 1_000_000.0}
_LOCAL_THETA = 10_000.0
_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"}
# rope_type -> the keys that it reads beyond those of all.
_TYPES = {
    "default": set(),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}


def read_rope(raw: Mapping[str, Any], model_type: str, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` that are about rotary embedding.

    Raises:
      ValueError: an unknown kind or key, a number that is missing, or places that contradict each other.
    """
    top = {name: raw.get(name) for name in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")}
    places = {
        "config.json": top,
        "rope_parameters": raw.get("rope_parameters"),
        "rope_scaling": raw.get("rope_scaling"),
    }
    local: dict[str, Any] = {}
    if model_type == "gemma3_text":
        nested = raw.get("rope_parameters") or {}
        if not isinstance(nested, Mapping) or not nested.keys() <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"config.json: rope_parameters={nested!r}; it must hold full_attention and sliding_attention; take the "
                "file of the weights."
            )
        places["rope_parameters"] = nested.get("full_attention")
        base = {"rope_theta": raw.get("rope_local_base_freq")}
        found = _merged({"config.json": base, "rope_parameters": nested.get("sliding_attention")}, model_type)
        if found["rope_type"] != "default":
            raise _unknown("rope_type of sliding_attention", found["rope_type"], ("default",))
        local = {"sliding_rope_theta": number(found, "rope_theta", _LOCAL_THETA)}
    rope = _merged(places, model_type)
    if "rope_theta" not in rope and "rope_theta" in raw:
        raise ValueError(
            "config.json: rope_theta is null; it must be a positive number; remove the key for the default."
        )
    share = positive(rope, "partial_rotary_factor", 1.0)
    if share > 1 or (share != 1 and model_type != "phi3"):
        raise _unknown("partial_rotary_factor", share, (1.0,))
    width = int(head_dim * share)
    return {
        "rope_theta": number(rope, "rope_theta", _THETA.get(model_type, 10_000.0)),
        "rope_scaling": _scaling(rope, max_positions),
        "rotary_dim": None if width == head_dim else width,
    } | local


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Returns what `read_rope` reads, for transformers of before and after 5."""
    raw: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.sliding_rope_theta is not None:
        raw["rope_local_base_freq"] = config.sliding_rope_theta
    if config.rotary_dim is not None:
        raw["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    match config.rope_scaling:
        case Llama3RopeScaling() as scaling:
            rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
            rope |= {"high_freq_factor": scaling.high_freq_factor}
        case LinearRopeScaling() as scaling:
            rope = {"rope_type": "linear", "factor": scaling.factor}
        case YarnRopeScaling() as scaling:
            rope = {"rope_type": "yarn", "factor": scaling.factor, "attention_factor": scaling.attention_factor}
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        case LongRopeScaling() as scaling:
            rope = {"rope_type": "longrope", "attention_factor": scaling.attention_factor}
            rope |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        case None:
            return raw
    if not isinstance(config.rope_scaling, LinearRopeScaling):
        rope["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
        if config.model_type == "phi3":
            raw["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
    return raw | {"rope_scaling": rope}


def _merged(places: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Returns the settings of all places, which must agree, with a rope_type."""
    merged: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for place, given in places.items():
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"config.json: {place}={given!r} is no object; take the file of the weights.")
        settings = dict(given)
        if "rope_type" not in settings and "type" in settings:
            settings["rope_type"] = settings.pop("type")
        if place != "config.json":
            settings.setdefault("rope_type", "default")
            if model_type == "phi3" and settings["rope_type"] in ("su", "yarn"):
                settings["rope_type"] = "longrope"  # by its earlier names
        for name, value in settings.items():
            if value is None:
                continue
            said_by.setdefault(name, place)
            if merged.setdefault(name, value) != value:
                raise ValueError(
                    f"config.json: {place} says {name}={value!r}, another place says {merged[name]!r}; they must "
                    "agree; take the file of the weights, or remove the one that is wrong."
                )
    merged.setdefault("rope_type", "default")
    if not isinstance(merged["rope_type"], str) or merged["rope_type"] not in _TYPES:
        raise _unknown("rope_type", merged["rope_type"], tuple(_TYPES))
    if unknown := merged.keys() - _COMMON - _TYPES[merged["rope_type"]]:
        name = min(unknown)
        raise ValueError(
            f"config.json: the key {name} (here {merged[name]!r}) of {said_by[name]} is not known for rope_type "
            f"{merged['rope_type']!r}; it may change what the model computes; choose a model without it."
        )
    return merged


def _unknown(name: str, value: Any, allowed: tuple[Any, ...]) -> ValueError:
    return ValueError(
        f"config.json: {name}={value!r} is not supported; allowed is {' or '.join(map(repr, allowed))}; choose a model "
        "without this feature."
    )


def _scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    def original() -> int:
        found = integer(rope, "original_max_position_embeddings", max_positions)
        if found < 2:
            raise ValueError(f"config.json: original_max_position_embeddings={found} must be above 1; correct it.")
        return found

    match rope["rope_type"]:
        case "llama3":
            return Llama3RopeScaling(
                factor=number(rope, "factor"),
                low_freq_factor=number(rope, "low_freq_factor"),
                high_freq_factor=number(rope, "high_freq_factor"),
                original_max_positions=integer(rope, "original_max_position_embeddings"),
            )
        case "linear":
            return LinearRopeScaling(factor=number(rope, "factor"))
        case "yarn":
            factor = positive(rope, "factor", max_positions / original())
            size = _yarn_size(factor, 1.0)
            if rope.get("mscale") and rope.get("mscale_all_dim"):
                size = _yarn_size(factor, positive(rope, "mscale"))
                size /= _yarn_size(factor, positive(rope, "mscale_all_dim"))
            return YarnRopeScaling(
                factor=factor,
                original_max_positions=original(),
                attention_factor=number(rope, "attention_factor", size),
                beta_fast=number(rope, "beta_fast", 32.0),
                beta_slow=number(rope, "beta_slow", 1.0),
                truncate=rope.get("truncate") is None or flag(rope, "truncate"),
            )
        case "longrope":
            factor = positive(rope, "factor", max_positions / original())
            size = math.sqrt(1 + math.log(factor) / math.log(original())) if factor > 1 else 1.0
            return LongRopeScaling(
                short_factor=_numbers(rope, "short_factor"),
                long_factor=_numbers(rope, "long_factor"),
                original_max_positions=original(),
                attention_factor=number(rope, "attention_factor", size),
            )
    return None  # default; and dynamic, which stretches rows beyond the model's positions alone


def _yarn_size(factor: float, mscale: float) -> float:
    """Returns the factor of cosines and sines; arXiv 2309.00071, eq. 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _numbers(rope: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or not values:
        raise ValueError(f"config.json: {name}={values!r}; it must be a list of numbers; take the file of the weights.")
    return tuple(number({name: value}, name) for value in values)
