"""Pairs as tall matrices, and the small r x r problems of all of them solved in one call.

A factor is a stack of tall matrices X: (k, rows, r), whatever the layout of its leaf: A as (n, r), B as its transpose
(m, r), both at least float32. Everything expensive about a pair happens in r dimensions, r being 8 or so, and there are
as many such problems as the model has adapters: they are concatenated and solved as one batch (`in_one_call`).

LAPACK is called once a matrix, with an overhead that is larger than an 8 x 8 problem, and it is slow or missing on
accelerators. Two of its routines are therefore avoided:
  * the inverse of a symmetric matrix is swept (Gauss-Jordan without exchanges, stable for a positive matrix), r
    elementwise steps over the whole batch. A vanishing pivot is left out, so a singular matrix gives no NaN.
  * orthonormal columns come from the Gram matrix XᵀX instead of a QR of X. That squares the condition number κ, so it
    is done twice: after the rotation by the Gram matrix's eigenvectors the columns are almost orthogonal, their own
    norms are accurate, and a second Gram matrix, close to the identity, corrects what is left. The columns are
    orthonormal to a few units of rounding as long as κ is below about 1/(30 eps): 3e5 in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stable_lora_jax.optim.pairs import Pair

# A sweep costs r passes over the batch of r x r matrices; above this rank LAPACK's blocked routines win.
_LARGEST_SWEPT = 32


def tall(
    pairs: Sequence[Pair], leaves: Sequence[Array]
) -> tuple[list[Float[Array, "_k _n _r"]], list[Float[Array, "_k _m _r"]]]:
    """Returns the A and the B of every pair, out of a flattened tree, as tall matrices of at least float32.

    Raises:
      ValueError: a pair of square matrices, where the rank axis cannot be told.
    """
    axes = [_known_rank_axes(pair) for pair in pairs]
    return (
        [_tall(leaves[pair.a], pair.stack_axes, rank_a) for pair, (rank_a, _) in zip(pairs, axes, strict=True)],
        [_tall(leaves[pair.b], pair.stack_axes, rank_b) for pair, (_, rank_b) in zip(pairs, axes, strict=True)],
    )


def put_back(pairs: Sequence[Pair], factors: Sequence[Float[Array, "_k _rows _r"]], leaves: Sequence[Any]) -> list[Any]:
    """Returns `leaves` with A and B replaced by `factors`, all A and then all B, in the leaves' shapes and dtypes."""
    replaced = list(leaves)
    for pair, a, b in zip(pairs, factors[: len(pairs)], factors[len(pairs) :], strict=True):
        rank_a, rank_b = _known_rank_axes(pair)
        replaced[pair.a] = _like(leaves[pair.a], a, pair.stack_axes, rank_a)
        replaced[pair.b] = _like(leaves[pair.b], b, pair.stack_axes, rank_b)
    return replaced


def gram(x: Float[Array, "k rows r"], y: Float[Array, "k rows r"]) -> Float[Array, "k r r"]:
    """Returns xᵀy, in full precision also where products default to less."""
    return jnp.einsum("kni,knj->kij", x, y, precision=jax.lax.Precision.HIGHEST)


def times(x: Float[Array, "k rows r"], t: Float[Array, "k r r"]) -> Float[Array, "k rows r"]:
    """Returns x t, in full precision also where products default to less."""
    return jnp.einsum("kni,kij->knj", x, t, precision=jax.lax.Precision.HIGHEST)


def transpose(x: Float[Array, "k i j"]) -> Float[Array, "k j i"]:
    """Returns the transpose of every matrix."""
    return jnp.swapaxes(x, -1, -2)


def in_one_call(function: Callable[..., Any], *columns: Sequence[Array]) -> list[Any]:
    """Returns ``[function(*row) for row in zip(*columns)]``, with one call for all rows of the same rank and dtype.

    `function` must treat its first axis as a batch, in what it takes and in everything it returns.
    """
    rows = list(zip(*columns, strict=True))
    kinds: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault((row[0].shape[1:], row[0].dtype), []).append(number)
    results: list[Any] = [None] * len(rows)
    for numbers in kinds.values():
        result = function(*(jnp.concatenate(each) for each in zip(*(rows[n] for n in numbers), strict=True)))
        start = 0
        for number in numbers:
            stop = start + rows[number][0].shape[0]
            results[number] = jax.tree.map(lambda x, span=slice(start, stop): x[span], result)
            start = stop
    return results


def inverse(grams: Float[Array, "k r r"]) -> Float[Array, "k r r"]:
    """Returns the inverses of symmetric positive matrices; what is singular within rounding is inverted to 0."""
    rank = grams.shape[-1]
    eps = jnp.finfo(grams.dtype).eps
    if rank > _LARGEST_SWEPT:
        return jnp.linalg.pinv(grams, rtol=rank * eps, hermitian=True)
    floor = rank * eps * jnp.max(jnp.diagonal(grams, axis1=-2, axis2=-1), axis=-1)
    swept = grams
    for i in range(rank):
        pivot, column = swept[:, i, i], swept[:, :, i]
        usable = pivot > floor
        reciprocal = jnp.where(usable, 1 / jnp.where(usable, pivot, 1), 0)[:, None]
        scaled = column * reciprocal
        swept = swept - column[:, :, None] * scaled[:, None, :]
        swept = swept.at[:, :, i].set(scaled).at[:, i, :].set(scaled).at[:, i, i].set(-reciprocal[:, 0])
    return -swept


def orthonormalizers(factors: Sequence[Float[Array, "_k _rows _r"]]) -> list[Float[Array, "_k _r _r"]]:
    """Returns for every X a T such that the columns of X T are orthonormal: with X = U R, U = X T and T = pinv(R).

    Where X loses rank (singular values below r eps times the largest) the columns of T, and so of X T, are 0.
    """
    rotations = in_one_call(lambda x: jnp.linalg.eigh(x, symmetrize_input=False)[1], [gram(x, x) for x in factors])
    rotated = [times(x, q) for x, q in zip(factors, rotations, strict=True)]
    return in_one_call(_normalizer, rotations, [gram(y, y) for y in rotated])


def _normalizer(q: Float[Array, "k r r"], nearly_diagonal: Float[Array, "k r r"]) -> Float[Array, "k r r"]:
    """Returns T = Q D⁻¹ G^(-1/2), with D the norms of X Q's columns and G = D⁻¹ (X Q)ᵀ(X Q) D⁻¹, close to I."""
    rank = q.shape[-1]
    norms = jnp.sqrt(jnp.diagonal(nearly_diagonal, axis1=-2, axis2=-1))
    kept = norms > rank * jnp.finfo(q.dtype).eps * jnp.max(norms, axis=-1, keepdims=True)
    reciprocal = jnp.where(kept, 1 / jnp.where(kept, norms, 1), 0)
    g = nearly_diagonal * reciprocal[:, :, None] * reciprocal[:, None, :]
    # Two Newton steps for G^(-1/2) from I: the error ε of G - I becomes ε², then ε⁴.
    eye = jnp.eye(rank, dtype=q.dtype)
    root = 1.5 * eye - 0.5 * g
    root = 1.5 * root - 0.5 * times(times(times(root, root), root), g)
    return times(q * reciprocal[:, None, :], root)


def _known_rank_axes(pair: Pair) -> tuple[int, int]:
    if pair.rank_axes is None:
        raise ValueError(
            f"The rank axis of the pair '{pair.name}' cannot be told: A and B are square and of the same size. This "
            "optimizer needs it; use a rank below the fan-in and the fan-out."
        )
    return pair.rank_axes


def _order(leaf: Array, stack_axes: tuple[int, ...], rank_axis: int) -> tuple[int, ...]:
    """Returns the leaf's axes as stack, rows, rank."""
    rows = [axis for axis in range(leaf.ndim) if axis not in stack_axes and axis != rank_axis]
    return (*stack_axes, *rows, rank_axis)


def _tall(leaf: Array, stack_axes: tuple[int, ...], rank_axis: int) -> Float[Array, "k rows r"]:
    moved = jnp.transpose(leaf, _order(leaf, stack_axes, rank_axis))
    wide = moved.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    count, rank = math.prod(leaf.shape[axis] for axis in stack_axes), leaf.shape[rank_axis]
    return wide.reshape(count, leaf.size // (count * rank), rank)


def _like(leaf: Array, matrices: Float[Array, "k rows r"], stack_axes: tuple[int, ...], rank_axis: int) -> Array:
    order = _order(leaf, stack_axes, rank_axis)
    moved = matrices.reshape([leaf.shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(leaf.ndim)]).astype(leaf.dtype)
