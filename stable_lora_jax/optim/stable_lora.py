"""Stable-LoRA (arXiv 2603.05204): shrink A in the early steps, until it no longer drowns what B learns.

Why. One step of training ``y = x W + s (x A) B`` moves the output by ``δ₁ + δ₂ + δ₃``, where δ₁ = -s η (x A) g_B
comes from moving B, δ₂ from moving A and δ₃ from both. Feature learning is stable when none of them grows or vanishes
with the width n. With sign-like optimizers (Adam) this needs A's outputs to be of order η n (theorem 3.1), and they
then stay so by themselves. But A starts random, with outputs of order one, because A = B = 0 is a saddle; at the
learning rates of fine-tuning that is too large, and no later step removes it: δ₁ dominates for the whole run. So start
from the random A, and erase it while B grows.

What (algorithm 1). Per pair and step, with the values from before the step and until it has happened once:

    if ‖A‖/n < ‖B‖/m:  stable ← true        (for good: A is never shrunk again)
    else:              A ← (1 - λ) A

The shrink is not a gradient: it is not scaled by the learning rate, and no moment ever sees it.

Two forms. `stable_lora_shrink` is one more link of an `optax.chain`; its updates add to the others', so A becomes
(1 - λ - η w) A with weight decay w, where the paper's sequence gives (1 - λ)(1 - η w) A. `stable_lora` wraps an inner
transformation and hands it the shrunk A: it is the authors' optimizer up to rounding.

Deviations from the paper and the reference code:
  * The test is strict, ``<``, as in the authors' code: a tie shrinks. The paper writes ≤.
  * The flags are part of the optimizer state and survive a checkpoint; the authors' code forgets them on resume.
  * In bfloat16 (1 - λ) A rounds back to A for λ up to 0.0015, so that the method would silently do nothing. Adapters
    narrower than float32 therefore collect their shrinks in one float32 scalar per matrix, `pending`, which is
    multiplied into A once it is worth 3 %. Until then the stored A, and so the forward pass, is up to 3 % behind; the
    norms tested and reported are those of pending · A.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32

from stable_lora_jax.optim.explicit_axes import on_auto_axes
from stable_lora_jax.optim.hyperparameters import check_range
from stable_lora_jax.optim.layouts import other_axes
from stable_lora_jax.optim.pairs import (
    Labels,
    Pair,
    PyTree,
    StackAxes,
    check_updates,
    find_pairs,
    frobenius_norm,
    is_none,
    is_placeholder,
)

Lambda: TypeAlias = float | Array | Callable[[Array], Array | float]

_LAM = (
    "lam is the fraction of A removed each step while the pair is unstable; the paper uses 0.0005 to 0.005, and 0 "
    "switches the shrink off."
)

# bfloat16 holds 8 significant bits: scaling by 1 - 2**-5 moves every entry by 4 to 8 units in its last place, so that
# rounding it costs little, and the stored A is never more than about 3 % behind.
_APPLY_PENDING_AT = 1 - 2**-5


class StableLoraState(NamedTuple):
    """State of Stable-LoRA. Each dict is keyed by pair name; an entry has one element per matrix of a stack.

    Attributes:
      count: number of updates so far.
      stable: whether the pair has met ‖A‖/n < ‖B‖/m; once true, always true.
      pending: the factor in (0, 1] still to be multiplied into A; only for adapters narrower than float32.
    """

    count: Int32[Array, ""]
    stable: dict[str, Bool[Array, "*stack"]]
    pending: dict[str, Float32[Array, "*stack"]]


def stable_lora_shrink(
    lam: Lambda, *, labels: Labels = None, stack_axes: StackAxes = "infer", stop_when_stable: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns the shrink of Stable-LoRA as a link for `optax.chain`, to stand after the optimizer.

    Adds -λ A to the updates of every A whose pair is not stable yet, and passes everything else through. Inside
    `optax.MultiSteps` it acts once per real step; put it inside, not around.

    Args:
      lam: λ, the fraction of A removed each step, in [0, 1), or a schedule from the step to it. The paper searches
        {0.0005, 0.001, 0.002, 0.005}.
      labels: which leaves are A and B; see `find_pairs`. None finds them by name.
      stack_axes: which axes count matrices rather than belong to one; see `find_pairs`.
      stop_when_stable: False keeps shrinking after the condition is met (the paper's ablation). The flags still latch.

    Raises:
      ValueError: λ outside [0, 1); in init, everything that `find_pairs` raises; in update, params missing.

    Examples:
      >>> params = {"lora_a": jnp.ones((64, 8)), "lora_b": jnp.zeros((8, 64))}
      >>> tx = optax.chain(optax.adamw(1e-4, weight_decay=0.0), stable_lora_shrink(0.001))
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> print(f"{optax.apply_updates(params, updates)['lora_a'][0, 0]:.3f}")
      0.999

    References:
      Wu, Gao, Li and Wu, "Stable-LoRA: Stabilizing Feature Learning of Low-Rank Adaptation", 2026, arXiv 2603.05204,
      algorithm 1.
    """
    if not callable(lam):
        check_range("lam", lam, 0, 1, _LAM)

    def init(params: PyTree) -> StableLoraState:
        return _init(params, labels, stack_axes)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, StableLoraState]:
        del extra_args
        _, factors, state = _shrink(updates, state, params, lam, labels, stack_axes, stop_when_stable)
        return _add_shrinks(updates, params, factors, labels, stack_axes), state

    return optax.GradientTransformationExtraArgs(init, update)


def stable_lora(
    inner: optax.GradientTransformation,
    lam: Lambda,
    *,
    labels: Labels = None,
    stack_axes: StackAxes = "infer",
    stop_when_stable: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Returns Stable-LoRA around any optimizer: A is shrunk first, then `inner` steps from the shrunk A.

    ``A ← A + (A' - A) + inner(g, A')`` with A' = (1 - λ) A; ``stable_lora(optax.adamw(lr), lam)`` is the authors'
    optimizer. Differs from `stable_lora_shrink` in a chain only where `inner` reads A, as weight decay does.

    Averaging that keeps iterates of its own goes around Stable-LoRA, as in
    ``optax.contrib.schedule_free(stable_lora(inner, lam), lr)``. As `inner`, or earlier in a chain, it never shrinks
    its base iterate, which pulls A back: after 200 steps of λ = 0.01, ‖A‖ is at 0.43 of its start instead of 0.13.

    Args:
      inner: the transformation that turns gradients into updates.
      lam, labels, stack_axes, stop_when_stable: as in `stable_lora_shrink`.

    Returns:
      A transformation whose state is the pair (StableLoraState, state of `inner`).

    Raises:
      ValueError: as `stable_lora_shrink`.

    Examples:
      >>> params = {"lora_a": jnp.ones((64, 8)), "lora_b": jnp.zeros((8, 64))}
      >>> tx = stable_lora(optax.adamw(1e-4), lam=0.001)
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)

    References:
      Wu, Gao, Li and Wu, "Stable-LoRA: Stabilizing Feature Learning of Low-Rank Adaptation", 2026, arXiv 2603.05204,
      algorithm 1.
    """
    if not callable(lam):
        check_range("lam", lam, 0, 1, _LAM)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> tuple[StableLoraState, optax.OptState]:
        return _init(params, labels, stack_axes), inner.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, tuple[StableLoraState, optax.OptState]]:
        shrunk, factors, shrink_state = _shrink(updates, state[0], params, lam, labels, stack_axes, stop_when_stable)
        updates, inner_state = inner.update(updates, state[1], shrunk, **extra_args)
        return _add_shrinks(updates, params, factors, labels, stack_axes), (shrink_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _init(params: PyTree, labels: Labels, stack_axes: StackAxes) -> StableLoraState:
    count = jnp.zeros((), jnp.int32)
    if is_placeholder(params):
        leaf: Any = count
        return StableLoraState(count, leaf, leaf)
    leaves, pairs = jax.tree.leaves(params, is_leaf=is_none), find_pairs(params, labels, stack_axes)
    shapes = {pair.name: tuple(leaves[pair.a].shape[axis] for axis in pair.stack_axes) for pair in pairs}
    return StableLoraState(
        count=count,
        stable={name: jnp.zeros(shape, jnp.bool_) for name, shape in shapes.items()},
        pending={p.name: jnp.ones(shapes[p.name], jnp.float32) for p in pairs if _is_narrow(leaves[p.a].dtype)},
    )


def _shrink(
    updates: PyTree,
    state: StableLoraState,
    params: PyTree | None,
    lam: Lambda,
    labels: Labels,
    stack_axes: StackAxes,
    stop_when_stable: bool,
) -> tuple[PyTree, dict[str, Array], StableLoraState]:
    """Returns the parameters with every A shrunk for this step, the factors by pair name, and the new state."""
    if params is None:
        raise ValueError(
            "Stable-LoRA got params=None. It reads A and B to decide whether to shrink: call "
            "tx.update(grads, opt_state, params)."
        )
    check_updates(updates, params)
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_none)
    pairs = find_pairs(params, labels, stack_axes)
    of_pairs = {index: leaves[index] for pair in pairs for index in (pair.a, pair.b)}

    def shrink(
        leaves: dict[int, Array], state: StableLoraState, lam: Lambda
    ) -> tuple[dict[int, Array], dict[str, Array], StableLoraState]:
        factors, state = _advance(leaves, pairs, state, lam, stop_when_stable)
        shrunk = {
            pair.a: (leaves[pair.a] * _spread(factors[pair.name], leaves[pair.a], pair)).astype(leaves[pair.a].dtype)
            for pair in pairs
        }
        return shrunk, factors, state

    like = {pair.a: leaves[pair.a] for pair in pairs}, state.stable, state
    shrunk, factors, state = on_auto_axes(shrink, like, of_pairs, state, lam)
    return jax.tree.unflatten(treedef, [shrunk.get(i, leaf) for i, leaf in enumerate(leaves)]), factors, state


def _add_shrinks(
    updates: PyTree, params: PyTree, factors: dict[str, Array], labels: Labels, stack_axes: StackAxes
) -> PyTree:
    """Returns the updates with (factor - 1) A added to those of every A; the same bits where the factor is 1."""
    moves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
    leaves, pairs = jax.tree.leaves(params, is_leaf=is_none), find_pairs(params, labels, stack_axes)

    def add(moves: dict[str, Array], matrices: dict[str, Array], factors: dict[str, Array]) -> dict[str, Array]:
        return {pair.name: _add(moves[pair.name], matrices[pair.name], factors[pair.name], pair) for pair in pairs}

    of_a = {pair.name: moves[pair.a] for pair in pairs}
    added = on_auto_axes(add, of_a, of_a, {pair.name: leaves[pair.a] for pair in pairs}, factors)
    for pair in pairs:
        moves[pair.a] = added[pair.name]
    return jax.tree.unflatten(treedef, moves)


def _advance(
    leaves: Mapping[int, Array], pairs: Sequence[Pair], state: StableLoraState, lam: Lambda, stop_when_stable: bool
) -> tuple[dict[str, Array], StableLoraState]:
    """Returns the factor that each stored A is multiplied by in this step, by pair name, and the state after it."""
    rate = lam(state.count) if callable(lam) else lam
    factors, stable, pending = {}, {}, {}
    for pair in pairs:
        behind = state.pending.get(pair.name)
        norm_a, norm_b = norms_of_pair(leaves[pair.a], leaves[pair.b], pair, behind)
        # 1 - λ in the norms' width: in bfloat16, where inject_hyperparams may bring λ, it would be 1.
        keep = 1 - jnp.asarray(rate, norm_a.dtype)
        # stable once ‖A‖/n < ‖B‖/m
        stable[pair.name] = state.stable[pair.name] | (norm_a < pair.fan_ratio * norm_b)
        stop = stable[pair.name] & stop_when_stable
        # A ← (1 - λ) A
        factor = jnp.where(stop, jnp.ones_like(keep), keep)
        if behind is not None:
            behind = behind * factor
            due = stop | (behind <= _APPLY_PENDING_AT)
            factor = jnp.where(due, behind, 1.0)
            pending[pair.name] = jnp.where(due, 1.0, behind)
        factors[pair.name] = factor
    return factors, StableLoraState(state.count + 1, stable, pending)


def norms_of_pair(a: Array, b: Array, pair: Pair, pending: Array | None) -> tuple[Array, Array]:
    """Returns ‖A‖ with the shrinks still to be applied to it, and ‖B‖, the same for all A that share a B."""
    norm_a, norm_b = frobenius_norm(a, pair.stack_axes), frobenius_norm(b, pair.stack_axes_b)
    return norm_a if pending is None else norm_a * pending, jnp.broadcast_to(norm_b, norm_a.shape)


def _add(move: Array, a: Array, factor: Array, pair: Pair) -> Array:
    factor = _spread(factor, a, pair)
    dtype = jnp.promote_types(move.dtype, a.dtype)
    return jnp.where(factor == 1, move.astype(dtype), (move + (factor - 1) * a).astype(dtype))


def _spread(factor: Array, a: Array, pair: Pair) -> Array:
    """Returns one factor per matrix as an array that multiplies A, whatever its stack axes."""
    return jnp.expand_dims(factor, other_axes(a.ndim, pair.stack_axes))


def _is_narrow(dtype: jnp.dtype) -> bool:
    return jnp.finfo(dtype).bits < 32
