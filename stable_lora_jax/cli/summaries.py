"""What a run's lines come to, as ``stable-lora watch`` shows it in the terminal and on its page."""

import statistics
from typing import Any

from stable_lora_jax.training import stop_steps


def validated(lines: list[dict[str, Any]]) -> str:
    """Returns the last validation as text, and the best one; nothing without."""
    found = [(line["validation"], line["step"]) for line in lines if "validation" in line]
    if not found:
        return ""
    last, (best, step) = found[-1][0], min(found, key=lambda each: each[0]["loss"])
    accuracy = f", accuracy {last['accuracy']:.3f}" if "accuracy" in last else ""
    return f"validation {last['loss']:.4f}{accuracy}, lowest {best['loss']:.4f} at step {step}"


def stops(lines: list[dict[str, Any]]) -> list[tuple[str, int, int, int, int]]:
    """Returns (pair, stable matrices, first, median and last stop step) of every pair with one that is stable."""
    each = {pair: sorted(steps.values()) for pair, steps in stop_steps(lines).items()}
    return [(pair, len(s), s[0], round(statistics.median(s)), s[-1]) for pair, s in each.items()]
