"""Optax transformations that know LoRA pairs. Everything here works on pytrees alone.

Every number may come from `optax.inject_hyperparams`. It casts numbers to the parameters' dtype, in which 0.999 may be
1 (bfloat16): give it ``hyperparam_dtype=jnp.float32``. It takes functions for schedules: if `labels` or `stack_axes` is
one, give it ``static_args=("labels", "stack_axes")``.
"""

from stable_lora_jax.optim.lora_plus import lora_plus
from stable_lora_jax.optim.lora_rite import LoraRiteState, lora_rite, scale_by_lora_rite
from stable_lora_jax.optim.lora_rite_report import LoraRiteReport, lora_rite_report
from stable_lora_jax.optim.pairs import Pair, PairSpec, find_pairs, lora_labels
from stable_lora_jax.optim.riemannian import RiemannianState, riemannian_adamw, scale_by_riemannian
from stable_lora_jax.optim.stability import PairNorms, PairStability, pair_norms, reset_stability, stability
from stable_lora_jax.optim.stable_lora import StableLoraState, stable_lora, stable_lora_shrink
from stable_lora_jax.optim.terms import UpdateTerms, update_terms

__all__ = [
    "LoraRiteReport",
    "LoraRiteState",
    "Pair",
    "PairNorms",
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
    "pair_norms",
    "reset_stability",
    "riemannian_adamw",
    "scale_by_lora_rite",
    "scale_by_riemannian",
    "stability",
    "stable_lora",
    "stable_lora_shrink",
    "update_terms",
]
