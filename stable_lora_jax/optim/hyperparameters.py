"""Checks of hyper-parameters, which may be numbers, or tracers that `optax.inject_hyperparams` brings."""

import math
from typing import Any, TypeAlias

from jax import core
from jaxtyping import Array

Number: TypeAlias = float | Array

_DECAY_RATE = (
    "It is the decay rate of a moment, e.g. 0.9 or 0.999. If optax.inject_hyperparams has rounded it to the dtype of "
    "the adapters, give it hyperparam_dtype=jnp.float32."
)


def check_range(name: str, value: Any, low: float, high: float, advice: str) -> None:
    """Raises a ValueError unless low <= value < high. A tracer, known at run time only, passes.

    Args:
      name: the argument's name.
      value: a number.
      low: smallest allowed value.
      high: first value that is too large; infinity also refuses infinity itself.
      advice: the sentences after "x=2 is not in [0, 1).": what it is and what to give.
    """
    if isinstance(value, core.Tracer):
        return
    if callable(value):
        raise ValueError(f"{name} is a function; a number is needed, as {name} follows no schedule. {advice}")
    if not low <= float(value) < high:
        raise ValueError(f"{name}={value} is not in [{low:g}, {high:g}). {advice}")


def check_adam(b1: Any, b2: Any, eps: Any, weight_decay: Any = 0.0) -> None:
    """Raises a ValueError unless these are numbers that AdamW can use."""
    for name, value in {"b1": b1, "b2": b2}.items():
        check_range(name, value, 0, 1, _DECAY_RATE)
    check_range("eps", eps, 0, math.inf, "It keeps a division by a second moment of 0 finite, e.g. 1e-8.")
    check_range("weight_decay", weight_decay, 0, math.inf, "0 switches it off.")
