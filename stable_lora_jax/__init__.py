"""Stable-LoRA for JAX (arXiv 2603.05204).

>>> import optax, stable_lora_jax
>>> optimizer = optax.chain(optax.adamw(1e-4), stable_lora_jax.stable_lora_shrink(lam=0.001))

This import is light: JAX and Optax only. Models, adapters, data and training are in subpackages of their own.
"""

from stable_lora_jax.optim import (
    PairStability,
    StableLoraState,
    lora_labels,
    stability,
    stable_lora,
    stable_lora_shrink,
)

__all__ = ["PairStability", "StableLoraState", "lora_labels", "stability", "stable_lora", "stable_lora_shrink"]
