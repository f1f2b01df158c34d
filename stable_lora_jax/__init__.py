"""Stable-LoRA for JAX (arXiv 2603.05204).

>>> import optax, stable_lora_jax
>>> optimizer = optax.chain(optax.adamw(1e-4), stable_lora_jax.stable_lora_shrink(lam=0.001))

This import is light: what `stable_lora_jax.optim` offers is imported when it is first used, and needs JAX and Optax
only. Models, adapters, data and training are in subpackages of their own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_lora_jax.optim import (
        LoraRiteReport as LoraRiteReport,
    )
    from stable_lora_jax.optim import (
        LoraRiteState as LoraRiteState,
    )
    from stable_lora_jax.optim import (
        Pair as Pair,
    )
    from stable_lora_jax.optim import (
        PairNorms as PairNorms,
    )
    from stable_lora_jax.optim import (
        PairSpec as PairSpec,
    )
    from stable_lora_jax.optim import (
        PairStability as PairStability,
    )
    from stable_lora_jax.optim import (
        RiemannianState as RiemannianState,
    )
    from stable_lora_jax.optim import (
        StableLoraState as StableLoraState,
    )
    from stable_lora_jax.optim import (
        UpdateTerms as UpdateTerms,
    )
    from stable_lora_jax.optim import (
        find_pairs as find_pairs,
    )
    from stable_lora_jax.optim import (
        lora_labels as lora_labels,
    )
    from stable_lora_jax.optim import (
        lora_plus as lora_plus,
    )
    from stable_lora_jax.optim import (
        lora_rite as lora_rite,
    )
    from stable_lora_jax.optim import (
        lora_rite_report as lora_rite_report,
    )
    from stable_lora_jax.optim import (
        pair_norms as pair_norms,
    )
    from stable_lora_jax.optim import (
        reset_stability as reset_stability,
    )
    from stable_lora_jax.optim import (
        riemannian_adamw as riemannian_adamw,
    )
    from stable_lora_jax.optim import (
        scale_by_lora_rite as scale_by_lora_rite,
    )
    from stable_lora_jax.optim import (
        scale_by_riemannian as scale_by_riemannian,
    )
    from stable_lora_jax.optim import (
        stability as stability,
    )
    from stable_lora_jax.optim import (
        stable_lora as stable_lora,
    )
    from stable_lora_jax.optim import (
        stable_lora_shrink as stable_lora_shrink,
    )
    from stable_lora_jax.optim import (
        update_terms as update_terms,
    )

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stable_lora_jax import optim

    return getattr(optim, name)


def __dir__() -> list[str]:
    return __all__
