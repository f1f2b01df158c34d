"""LoRA-RITE (arXiv 2410.20625): an adaptive step that does not depend on how A B is split into A and B.

Adam scales the entries of A and of B, so (A, B) and (A R⁻¹, R B), the same model, train differently. LoRA-RITE works in
coordinates that both share. Write the factors as tall matrices X_A = A: (n, r) and X_B = Bᵀ: (m, r), and X = U R with
orthonormal U. Per factor, with Y the other factor of its pair, T = R_Y⁻¹ and U_Y = Y T:

    u = g T                                             the gradient as if Y were orthonormal
    P = U_Yᵀ U_Y,old                                    the old basis in the new one
    V ← (1 - d2) uᵀu / rows + d2 P V Pᵀ                 second moment, r x r
    M ← (1 - d1) u (V + ρ)^(-1/2) + d1 M Pᵀ             first moment of the scaled gradient
    ΔX = -η M Tᵀ

with d = b (1 - b^(t-1)) / (1 - b^t), Adam's bias correction made part of the average. ρ grows by what the transport
P V Pᵀ loses of V ("escape", off by default). Before that, a factor whose u has a root mean square above
`update_skipping` does not move (u = 0), and all u together are clipped to the global norm `clip`.

Deviations from the reference code, none of which shows in its traces:
  * the state is in the optimizer state, and is there after a checkpoint; the reference forgets it.
  * everything inside is float32 for narrower adapters, which the reference does not take.
  * directions that no gradient has shown yet, where V's eigenvalues are zero within rounding, do not move. In the
    reference such an eigenvalue, if rounding has made it negative, becomes a NaN, then all of S becomes 0, and with a
    batch smaller than r nothing trains; if positive, what moves is rounding errors scaled up to a full step.
  * U comes from Gram matrices, not from QR (see `linalg`); the basis does not matter to A and B. Where a factor loses
    rank, as B = 0 does at the start, U has columns of zeros instead of arbitrary ones. In float32 that is the case from
    a condition number of about 1000 on, in the reference from 1e6 on.
  * skipped steps, silent in the reference, are counted (`lora_rite_report`): a factor that is skipped at every step is
    frozen, and the loss's scale is then too large for `update_skipping`. A gradient that holds NaN is not skipped and
    makes its factor NaN, as in other optimizers: a broken run shows, instead of standing still. An infinite one is
    skipped, or makes NaN where T holds a 0. `optax.apply_if_finite` around the optimizer passes over such steps.
  * `max_step_a` (off by default) guards the second step. B is of the size of η then, T of the size of 1/η, and so A
    moves by 43 to 149 % of its norm whatever η is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int32

from stable_lora_jax.optim.explicit_axes import auto_inside
from stable_lora_jax.optim.hyperparameters import Number, check_adam, check_range
from stable_lora_jax.optim.linalg import (
    batched_by_shape,
    factors,
    gram,
    group_by_shape,
    orthonormalizers,
    product,
    scatter_updates,
    times,
    transpose,
)
from stable_lora_jax.optim.pairs import (
    Labels,
    PyTree,
    StackAxes,
    check_updates,
    find_pairs,
    is_none,
    is_placeholder,
)


class FactorState(NamedTuple):
    """State of one factor, k matrices of it: its basis Uᵀ, moments mu = Mᵀ and nu = V, ρ, and how often it was skipped.

    The matrices are those of all pairs of one shape (see `linalg.group_by_shape`): taking a state per pair apart and
    putting it together again would take longer than the step.
    """

    basis: Float[Array, "k r rows"]
    mu: Float[Array, "k r rows"]
    nu: Float[Array, "k r r"]
    escape: Float[Array, "k"]
    skipped: Int32[Array, "k"]


class LoraRiteState(NamedTuple):
    """State of LoRA-RITE: the step count, both factors of each kind of pair, the last global clip factor in (0, 1]."""

    count: Int32[Array, ""]
    a: tuple[FactorState, ...]
    b: tuple[FactorState, ...]
    clip_factor: Float32[Array, ""]


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    clip: Number = 1.0,
    update_skipping: Number = 1.0,
    update_capping: Number = 0.0,
    escape: bool = False,
    balance: bool = False,
    weight_decay: Number = 0.0,
    max_step_a: Number | None = None,
    labels: Labels = None,
    stack_axes: StackAxes = "infer",
) -> optax.GradientTransformationExtraArgs:
    """Returns the LoRA-RITE optimizer; leaves that are no adapter get AdamW with the same b1, b2 and eps.

    Args:
      learning_rate: η, a number or a schedule.
      b1, b2, eps, clip, update_skipping, update_capping, escape: see `scale_by_lora_rite`.
      balance: rescale A and B to equal norms after every step; their product stays.
      weight_decay: decoupled, times the learning rate.
      max_step_a: largest ‖ΔA‖/‖A‖ of a step before `balance`, e.g. 0.1; None, the reference, does not limit it.
      labels, stack_axes: which leaves are A and B, and which axes count matrices; see `find_pairs`.

    Raises:
      ValueError: as `scale_by_lora_rite`; `weight_decay` or `max_step_a` negative or not finite.

    Examples:
      >>> params = {"lora_a": jnp.ones((64, 1)), "lora_b": jnp.zeros((1, 16))}
      >>> tx = lora_rite(1e-3)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> print(f"{updates['lora_b'][0, 0]:.6f}")  # -η sign(g)/‖A‖
      -0.000125

    References:
      Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", 2024,
      arXiv 2410.20625, algorithm 1.
    """
    check_range("weight_decay", weight_decay, 0, math.inf, "0 switches it off.")
    if max_step_a is not None:
        check_range("max_step_a", max_step_a, 0, math.inf, "It bounds ‖ΔA‖/‖A‖ of a step; None bounds nothing.")
    rite = scale_by_lora_rite(
        b1, b2, eps, clip, update_skipping, update_capping, escape, labels=labels, stack_axes=stack_axes
    )

    def others(tree: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
        paired = {index for pair in find_pairs(tree, labels, stack_axes) for index in (pair.a, pair.b)}
        moves = [i not in paired and hasattr(x, "dtype") for i, x in enumerate(leaves)]
        return jax.tree.unflatten(treedef, moves)

    links = [
        rite,
        optax.masked(optax.scale_by_adam(b1, b2, eps), others),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if max_step_a is not None:
        links.append(_on_pairs(_limit, labels, stack_axes, largest=max_step_a))
    if balance:
        links.append(_on_pairs(_balance, labels, stack_axes))
    return optax.chain(*links)


def scale_by_lora_rite(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    clip: Number = 1.0,
    update_skipping: Number = 1.0,
    update_capping: Number = 0.0,
    escape: bool = False,
    *,
    labels: Labels = None,
    stack_axes: StackAxes = "infer",
) -> optax.GradientTransformationExtraArgs:
    """Returns the direction M Tᵀ of LoRA-RITE (see the module) for every pair; other leaves pass through.

    Args:
      b1, b2: decay rates of the first and second moment, in [0, 1).
      eps: added to the root of V's eigenvalues.
      clip: largest global norm of all u together; 0 clips nothing.
      update_skipping: largest root mean square of a factor's u, above which it does not move in this step; 0 skips
        nothing. A gradient that holds NaN is never skipped.
      update_capping: largest root mean square of M; 0 caps nothing.
      escape: whether ρ collects what the transport of V loses.
      labels, stack_axes: which leaves are A and B, and which axes count matrices; see `find_pairs`.

    Raises:
      ValueError: a number out of range; in init, everything that `find_pairs` raises, and pairs whose rank axis is
        unknown; in update, params missing.

    References:
      Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", 2024,
      arXiv 2410.20625, algorithm 1.
    """
    check_adam(b1, b2, eps)
    limits = {"clip": clip, "update_skipping": update_skipping, "update_capping": update_capping}
    for name, value in limits.items():
        check_range(name, value, 0, math.inf, "0 switches it off.")

    def init(params: PyTree) -> LoraRiteState:
        step, clip_factor = jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
        if is_placeholder(params):
            leaf: Any = step
            return LoraRiteState(step, leaf, leaf, clip_factor)
        leaves = jax.tree.leaves(params, is_leaf=is_none)
        groups = group_by_shape(find_pairs(params, labels, stack_axes), leaves)
        of_pairs = {index: leaves[index] for group in groups for pair in group for index in (pair.a, pair.b)}
        sides = jax.eval_shape(functools.partial(factors, groups), of_pairs)  # their shapes and dtypes are enough
        a, b = (tuple(_start(x) for x in side) for side in sides)
        return LoraRiteState(step, a, b, clip_factor)

    @auto_inside(b1=b1, b2=b2, eps=eps, **limits)
    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        b1: Number,
        b2: Number,
        eps: Number,
        clip: Number,
        update_skipping: Number,
        update_capping: Number,
        **extra_args: object,
    ) -> tuple[PyTree, LoraRiteState]:
        del extra_args
        if params is None:
            raise ValueError(
                "LoRA-RITE got params=None. It reads A and B to scale the gradients: call "
                "tx.update(grads, opt_state, params)."
            )
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        check_updates(updates, params)
        values = jax.tree.leaves(params, is_leaf=is_none)
        groups = group_by_shape(find_pairs(params, labels, stack_axes), values)
        a, b = factors(groups, values)
        grad_a, grad_b = factors(groups, leaves)
        old = [*state.a, *state.b]
        step = state.count + 1

        def of_other_factor(values: list[Array]) -> list[Array]:
            return values[len(groups) :] + values[: len(groups)]

        maps, bases = orthonormalizers(a + b)
        transports = of_other_factor([gram(u, each.basis) for u, each in zip(bases, old, strict=True)])
        maps = of_other_factor(maps)
        # u = g T
        unmagnified = [times(g, t) for g, t in zip(grad_a + grad_b, maps, strict=True)]
        covariances = [gram(u, u) for u in unmagnified]
        entries = [u.shape[2] * min(u.shape[1], y.shape[2]) for u, y in zip(unmagnified, b + a, strict=True)]
        kept, scales, clip_factor = _skip_and_clip(entries, covariances, update_skipping, clip)
        # Chosen, not multiplied by 0: what is skipped may hold inf.
        unmagnified = [jnp.where(k[:, None, None], u, 0) for k, u in zip(kept, unmagnified, strict=True)]
        covariances = [
            jnp.where(k[:, None, None], c * (s**2 / u.shape[-1])[:, None, None], 0)
            for k, c, s, u in zip(kept, covariances, scales, unmagnified, strict=True)
        ]
        second_moment = functools.partial(_second_moment, step=step, b2=b2, eps=eps, escape=escape)
        before = [each.nu for each in old], [each.escape for each in old]
        seconds, roots, escapes = _unzip(batched_by_shape(second_moment, *before, covariances, transports))
        # M ← (1 - d1) u (V + ρ)^(-1/2) + d1 M Pᵀ
        d1s = [_debiased(b1, step, each.mu.dtype) for each in old]
        firsts = [
            times(u, ((1 - d1) * s)[:, None, None] * root) + times(each.mu, d1 * transpose(p))
            for d1, u, s, root, each, p in zip(d1s, unmagnified, scales, roots, old, transports, strict=True)
        ]
        moves = [
            times(_cap(m, count, update_capping), transpose(t))
            for m, count, t in zip(firsts, entries, maps, strict=True)
        ]
        skipped = [each.skipped + (~keep).astype(jnp.int32) for each, keep in zip(old, kept, strict=True)]
        new = tuple(FactorState(*each) for each in zip(bases, firsts, seconds, escapes, skipped, strict=True))
        sides = new[: len(groups)], new[len(groups) :]
        return jax.tree.unflatten(treedef, scatter_updates(groups, moves, leaves, values)), LoraRiteState(
            step, *sides, clip_factor
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _start(x: jax.ShapeDtypeStruct) -> FactorState:
    """Returns the state before the first step of a factor (k, r, rows)."""
    count, rank, _ = x.shape
    basis, first = (jnp.zeros(x.shape, x.dtype) for _ in range(2))
    second = jnp.zeros((count, rank, rank), x.dtype)
    return FactorState(basis, first, second, jnp.zeros(count, x.dtype), jnp.zeros(count, jnp.int32))


def _debiased(beta: Number, step: Array, dtype: jnp.dtype) -> Array:
    """Returns d = b (1 - b^(t-1)) / (1 - b^t), so that an average from zero needs no further correction."""
    return jnp.asarray(beta * (1 - beta ** (step - 1)) / (1 - beta**step), dtype)


def _skip_and_clip(
    entries: list[int], covariances: list[Array], update_skipping: Number, clip: Number
) -> tuple[list[Array], list[Array], Array]:
    """Returns (kept, scales, clip factor): per matrix whether it moves and what u is multiplied by, 0 if not.

    Args:
      entries: the number of entries of u, without the columns of zeros that U has where r exceeds its rows.
      covariances: uᵀu.
      update_skipping, clip: as in `scale_by_lora_rite`.
    """
    squares = [jnp.trace(c, axis1=-2, axis2=-1) for c in covariances]
    kept = [
        ~(square > update_skipping**2 * count) | (update_skipping == 0)  # NaN is no large number
        for square, count in zip(squares, entries, strict=True)
    ]
    norm = jnp.sqrt(sum(jnp.sum(jnp.where(keep, square, 0)) for keep, square in zip(kept, squares, strict=True)))
    clip_factor = jnp.where((norm > clip) & (clip > 0), clip / norm, 1.0)
    scales = [jnp.where(keep, clip_factor, 0).astype(square.dtype) for keep, square in zip(kept, squares, strict=True)]
    return kept, scales, clip_factor.astype(jnp.float32)


def _second_moment(
    second: Float[Array, "k r r"],
    rho: Float[Array, "k"],
    covariance: Float[Array, "k r r"],
    transport: Float[Array, "k r r"],
    step: Array,
    b2: Number,
    eps: Number,
    escape: bool,
) -> tuple[Float[Array, "k r r"], Float[Array, "k r r"], Float[Array, "k"]]:
    """Returns the new V, (V + ρ)^(-1/2) and ρ."""
    d2 = _debiased(b2, step, second.dtype)
    moved = _symmetric(product(product(transport, second), transpose(transport)))
    if escape:
        # ρ ← d2 (ρ + min(max_i(λ_i(V) - λ_i(P V Pᵀ)), tr V - tr P V Pᵀ)), both cut off at 0
        values = jnp.linalg.eigvalsh(jnp.concatenate([second, moved])).reshape(2, *second.shape[:2])
        lost = values[0] - values[1]
        rho = d2 * (rho + jnp.clip(jnp.minimum(jnp.max(lost, axis=-1), jnp.sum(lost, axis=-1)), min=0))
    # V ← (1 - d2) uᵀu / rows + d2 P V Pᵀ
    second = _symmetric((1 - d2) * covariance + d2 * moved)
    values, vectors = jnp.linalg.eigh(second, symmetrize_input=False)
    seen = values > values.shape[-1] * jnp.finfo(values.dtype).eps * values[:, -1:]
    scale = jnp.where(seen, 1 / (jnp.sqrt(jnp.clip(values, min=0) + rho[:, None]) + eps), 0)
    return second, product(vectors * scale[:, None, :], transpose(vectors)), rho


def _symmetric(x: Float[Array, "k r r"]) -> Float[Array, "k r r"]:
    return (x + transpose(x)) / 2


def _cap(first: Float[Array, "k r rows"], count: int, largest: Number) -> Float[Array, "k r rows"]:
    """Returns M, scaled down to a root mean square of `largest` over `count` entries; 0 caps nothing."""
    rms = jnp.sqrt(jnp.sum(first**2, axis=(-2, -1), keepdims=True) / count)
    return jnp.where((largest > 0) & (rms > largest), first * (largest / rms), first)


def _on_pairs(
    function: Callable[..., tuple[Array, Array]], labels: Labels, stack_axes: StackAxes, **numbers: Number
) -> optax.GradientTransformation:
    """Returns a link that replaces the updates of every pair by ``function(a, b, update of a, of b, **numbers)``."""

    @auto_inside(numbers=numbers)
    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, numbers: dict[str, Number]
    ) -> tuple[PyTree, Any]:
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        values = jax.tree.leaves(params, is_leaf=is_none)
        groups = group_by_shape(find_pairs(params, labels, stack_axes), values)
        each = zip(*factors(groups, values), *factors(groups, leaves), strict=True)
        moves_a, moves_b = zip(*(function(*group, **numbers) for group in each), strict=True)
        return jax.tree.unflatten(treedef, scatter_updates(groups, moves_a + moves_b, leaves, values)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _norm(x: Float[Array, "k r rows"]) -> Float[Array, "k 1 1"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))


def _limit(a: Array, b: Array, move_a: Array, move_b: Array, largest: Number) -> tuple[Array, Array]:
    """Returns the moves with ‖ΔA‖ no longer than `largest` times ‖A‖."""
    del b
    norm, longest = _norm(move_a), largest * _norm(a)
    return move_a * jnp.where(norm > longest, longest / norm, 1), move_b


def _balance(a: Array, b: Array, move_a: Array, move_b: Array) -> tuple[Array, Array]:
    """Returns the moves that end at equal norms √(‖A‖ ‖B‖), the product unchanged."""
    a_next, b_next = a + move_a, b + move_b
    ratio = jnp.sqrt((_norm(b_next) + 1e-6) / (_norm(a_next) + 1e-6))
    return a_next * ratio - a, b_next / ratio - b


def _unzip(rows: list[tuple[Array, ...]]) -> tuple[list[Array], ...]:
    return tuple(list(column) for column in zip(*rows, strict=True))
