"""Checks of hyper-parameters, which may be numbers, schedules, or tracers that `optax.inject_hyperparams` brings."""

from typing import Any, TypeAlias

from jax import core
from jaxtyping import Array

Number: TypeAlias = float | Array


def check_range(name: str, value: Any, low: float, high: float, advice: str) -> None:
    """Raises a ValueError unless low <= value < high. What is known at run time only is passed.

    Args:
      name: the argument's name.
      value: a number; schedules and tracers are not looked at.
      low: smallest allowed value.
      high: first value that is too large; infinity also refuses infinity itself.
      advice: the sentences after "x=2 is not in [0, 1).": what it is and what to give.
    """
    if callable(value) or isinstance(value, core.Tracer):
        return
    if not low <= float(value) < high:
        raise ValueError(f"{name}={value} is not in [{low:g}, {high:g}). {advice}")
