"""Stable-LoRA for JAX (arXiv 2603.05204).

>>> import optax, stable_lora_jax
>>> optimizer = optax.chain(optax.adamw(1e-4), stable_lora_jax.stable_lora_shrink(lam=0.001))

This import is light: JAX and Optax only. Models, adapters, data and training are in subpackages of their own.
"""

from stable_lora_jax.optim import (
    LoraRiteReport,
    LoraRiteState,
    Pair,
    PairSpec,
    PairStability,
    RiemannianState,
    StableLoraState,
    UpdateTerms,
    find_pairs,
    lora_labels,
    lora_plus,
    lora_rite,
    lora_rite_report,
    reset_stability,
    riemannian_adamw,
    scale_by_lora_rite,
    scale_by_riemannian,
    stability,
    stable_lora,
    stable_lora_shrink,
    update_terms,
)

__all__ = [
    "LoraRiteReport",
    "LoraRiteState",
    "Pair",
    "PairSpec",
    "PairStability",
    "RiemannianState",
    "StableLoraState",
    "UpdateTerms",
    "find_pairs",
    "lora_labels",
    "lora_plus",
    "lora_rite",
    "lora_rite_report",
    "reset_stability",
    "riemannian_adamw",
    "scale_by_lora_rite",
    "scale_by_riemannian",
    "stability",
    "stable_lora",
    "stable_lora_shrink",
    "update_terms",
]
