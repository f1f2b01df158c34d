"""Riemannian-preconditioned LoRA, "scaled AdamW" (arXiv 2402.02347): each factor's gradient in the other's metric.

The product A B moves by g_A B + A g_B, so the size of a step depends on how long the other factor happens to be. The
quotient metric of low-rank matrices takes that out, at the cost of two r x r inverses a pair:

    g_A ← g_A (B Bᵀ + δ I)⁻¹        g_B ← (Aᵀ A + δ I)⁻¹ g_B

For plain gradient descent the product then moves the same way for every equivalent pair (A R⁻¹, R B), as δ → 0. Adam on
top of it normalises entry by entry and loses that property: the published methods do so nevertheless.

Two orderings are published, and they are not the same algorithm (3.5 to 4.8 % apart after 40 steps):
  * "simultaneous" (the paper, PEFT): both gradients are preconditioned with A and B from before the step, then AdamW.
  * "sequential" (the authors' Mistral code): A steps first, and B is preconditioned with the A that has just been
    updated and decayed. Adam's eps is added to the root that is not corrected for bias, and decay comes after the step.
To reproduce that code: ``riemannian_adamw(lr, ordering="sequential", reg=1e-6, eps=1e-6, bias_correction=False)``.

Deviations: moments and preconditioner are float32 for narrower adapters (the references work in the parameters' dtype);
where a Gram matrix is singular, columns that depend on those before them are left out of its inverse, where a reference
would divide by zero.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from stable_lora_jax.optim.explicit_axes import auto_inside
from stable_lora_jax.optim.hyperparameters import Number, check_adam, check_range
from stable_lora_jax.optim.linalg import (
    batched_by_shape,
    factors,
    gram,
    group_by_shape,
    inverse,
    scatter_updates,
    times,
)
from stable_lora_jax.optim.pairs import Labels, Pair, PyTree, StackAxes, check_updates, find_pairs, is_none

ORDERINGS = ("simultaneous", "sequential")

_REG = (
    "reg is added to the diagonal of the r x r Gram matrices before they are inverted; PEFT uses 1e-2, the authors "
    "1e-6."
)


class RiemannianState(NamedTuple):
    """Adam's state: the number of updates, and the first and second moments of the preconditioned gradients."""

    count: Int32[Array, ""]
    mu: PyTree
    nu: PyTree


def scale_by_riemannian(
    reg: Number = 1e-2, *, labels: Labels = None, stack_axes: StackAxes = "infer"
) -> optax.GradientTransformationExtraArgs:
    """Returns the preconditioner alone: g_A (B Bᵀ + reg I)⁻¹ and (Aᵀ A + reg I)⁻¹ g_B; other leaves pass through.

    Args:
      reg: δ, added to the diagonal of both Gram matrices, >= 0.
      labels, stack_axes: which leaves are A and B, and which axes count matrices; see `find_pairs`.

    Raises:
      ValueError: reg negative or not finite; in init, everything that `find_pairs` raises, and pairs whose
        rank axis is unknown; in update, params missing.

    Examples:
      >>> params = {"lora_a": jnp.ones((64, 1)), "lora_b": 2 * jnp.ones((1, 16))}
      >>> tx = optax.chain(scale_by_riemannian(reg=0.0), optax.sgd(1.0))
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> print(f"{updates['lora_a'][0, 0]:.6f} {updates['lora_b'][0, 0]:.6f}")  # 1/(2² 16) and 1/(1² 64)
      -0.015625 -0.015625

    References:
      Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", 2024, arXiv 2402.02347,
      equation 4.
    """
    check_range("reg", reg, 0, math.inf, _REG)

    def init(params: PyTree) -> optax.EmptyState:
        _groups(params, labels, stack_axes)
        return optax.EmptyState()

    @auto_inside(reg=reg)
    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, reg: Number, **extra_args: object
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra_args
        a, b, groups = _factors(updates, params, labels, stack_axes)
        grads, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        grad_a, grad_b = factors(groups, grads)
        scaled = _precondition(grad_a + grad_b, b + a, reg)
        values = jax.tree.leaves(params, is_leaf=is_none)
        return jax.tree.unflatten(treedef, scatter_updates(groups, scaled, grads, values)), state

    return optax.GradientTransformationExtraArgs(init, update)


def riemannian_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ordering: str = "simultaneous",
    reg: Number = 1e-2,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    bias_correction: bool = True,
    labels: Labels = None,
    stack_axes: StackAxes = "infer",
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW on Riemannian-preconditioned gradients, in either published ordering (see the module).

    Leaves that are no adapter get AdamW.

    Args:
      learning_rate: a number or a schedule.
      ordering: "simultaneous" or "sequential".
      reg: δ of the preconditioner, >= 0.
      b1, b2, eps: Adam's; in the sequential ordering eps is not corrected for bias.
      weight_decay: decoupled, times the learning rate; before the step, or after it in the sequential ordering.
      bias_correction: whether the moments are corrected for their start at zero.
      labels, stack_axes: which leaves are A and B, and which axes count matrices; see `find_pairs`.

    Raises:
      ValueError: an unknown ordering, a number out of range; as `scale_by_riemannian`.

    References:
      Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", 2024, arXiv 2402.02347,
      algorithm 1, and its published code.
    """
    check_range("reg", reg, 0, math.inf, _REG)
    check_adam(b1, b2, eps, weight_decay)
    if ordering not in ORDERINGS:
        raise ValueError(f"ordering={ordering!r} is unknown. Known orderings: {', '.join(ORDERINGS)}.")
    sequential = ordering == "sequential"

    def init(params: PyTree) -> RiemannianState:
        _groups(params, labels, stack_axes)
        mu, nu = (jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p.dtype)), params) for _ in range(2))
        return RiemannianState(jnp.zeros((), jnp.int32), mu, nu)

    @auto_inside(learning_rate=learning_rate, reg=reg, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        learning_rate: optax.ScalarOrSchedule,
        reg: Number,
        b1: Number,
        b2: Number,
        eps: Number,
        weight_decay: Number,
        **extra_args: object,
    ) -> tuple[PyTree, RiemannianState]:
        del extra_args
        a, b, groups = _factors(updates, params, labels, stack_axes)
        step = state.count + 1
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)
        values = jax.tree.leaves(params, is_leaf=is_none)
        given, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        mus, nus = (jax.tree.leaves(moment, is_leaf=is_none) for moment in (state.mu, state.nu))
        grads = [None if g is None else g.astype(_wide(p.dtype)) for g, p in zip(given, values, strict=True)]
        grad_a, grad_b = factors(groups, grads)

        def adamw(g: Array | None, mu: Any, nu: Any, p: Any) -> tuple[Any, Any, Any]:
            """Returns (move, mu, nu) of one leaf; one that has no gradient stays."""
            if g is None:
                return None, mu, nu
            # mu ← b1 mu + (1 - b1) g;  nu ← b2 nu + (1 - b2) g²
            mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
            c1, c2 = (1 - beta**step if bias_correction else 1.0 for beta in (b1, b2))
            # mu/c1 / (√(nu/c2) + eps), or with eps added to √nu
            root = jnp.asarray(jnp.sqrt(c2), nu.dtype)
            change = -rate * (root / c1) * mu / (jnp.sqrt(nu) + (eps if sequential else eps * root))
            move = change - rate * weight_decay * (p + change if sequential else p)
            return move.astype(g.dtype), mu.astype(g.dtype), nu.astype(g.dtype)

        def adamw_of_all(preconditioned: list[Array]) -> tuple[list[Any], list[Any], list[Any]]:
            scaled = scatter_updates(groups, preconditioned, grads, values)
            moves, new_mus, new_nus = zip(*map(adamw, scaled, mus, nus, values), strict=True)
            return list(moves), list(new_mus), list(new_nus)

        scaled_a = _precondition(grad_a, b, reg)
        if sequential:  # of this first pass only the A is used
            moves, _, _ = adamw_of_all(scaled_a + grad_b)
            a, _ = factors(groups, [p if u is None else p + u for p, u in zip(values, moves, strict=True)])
        moves, mus, nus = adamw_of_all(scaled_a + _precondition(grad_b, a, reg))
        dtypes = [
            None if g is None else jnp.promote_types(g.dtype, p.dtype) for g, p in zip(given, values, strict=True)
        ]
        moves = [None if u is None else u.astype(dtype) for u, dtype in zip(moves, dtypes, strict=True)]
        mu, nu = (
            jax.tree.unflatten(jax.tree.structure(moment, is_leaf=is_none), leaves)
            for moment, leaves in ((state.mu, mus), (state.nu, nus))
        )
        return jax.tree.unflatten(treedef, moves), RiemannianState(step, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _precondition(
    grads: Sequence[Float[Array, "_k _r _rows"]], others: Sequence[Float[Array, "_k _r _rows"]], reg: Number
) -> list[Float[Array, "_k _r _rows"]]:
    """Returns g (XᵀX + reg I)⁻¹ for every gradient g of a factor and the other factor X of its pair."""

    def regular_inverse(grams: Float[Array, "k r r"]) -> Float[Array, "k r r"]:
        return inverse(grams + reg * jnp.eye(grams.shape[-1], dtype=grams.dtype))

    inverses = batched_by_shape(regular_inverse, [gram(x, x) for x in others])
    return [times(g, each) for g, each in zip(grads, inverses, strict=True)]


def _factors(
    updates: PyTree, params: PyTree | None, labels: Labels, stack_axes: StackAxes
) -> tuple[list[Array], list[Array], list[list[Pair]]]:
    if params is None:
        raise ValueError(
            "Riemannian preconditioning got params=None. It reads A and B to scale the gradients: call "
            "tx.update(grads, opt_state, params)."
        )
    check_updates(updates, params)
    groups = _groups(params, labels, stack_axes)
    return *factors(groups, jax.tree.leaves(params, is_leaf=is_none)), groups


def _groups(params: PyTree, labels: Labels, stack_axes: StackAxes) -> list[list[Pair]]:
    return group_by_shape(find_pairs(params, labels, stack_axes), jax.tree.leaves(params, is_leaf=is_none))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which the moments of a leaf are kept: its own, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
