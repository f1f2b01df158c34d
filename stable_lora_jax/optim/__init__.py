"""Optax transformations that know LoRA pairs. Everything here works on pytrees alone."""

from stable_lora_jax.optim.pairs import lora_labels
from stable_lora_jax.optim.stable_lora import (
    PairStability,
    StableLoraState,
    stability,
    stable_lora,
    stable_lora_shrink,
)

__all__ = ["PairStability", "StableLoraState", "lora_labels", "stability", "stable_lora", "stable_lora_shrink"]
