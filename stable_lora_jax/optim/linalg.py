"""Pairs as batches of matrices of one orientation, and the small r x r problems of all of them solved in one call.

A factor is a matrix X with r columns, whatever the layout of its leaf: X_A = A: (n, r), X_B = Bᵀ: (m, r). Here it is
stored transposed, so that long rows are contiguous, and all pairs of one shape, stacked or in leaves of their own, are
one array (k, r, rows), at least float32. Everything expensive about a pair happens in r dimensions, r being 8 or so:
these small problems of all factors are concatenated and solved as one batch (`batched_by_shape`).

LAPACK's QR is called once per matrix, with an overhead that is larger than an 8 x 8 problem, and its Cholesky gives NaN
for a singular matrix. Inverses and orthonormal columns both come from one routine instead (`_inverse_root`), a Cholesky
factor of all Gram matrices at once, in r elementwise steps over the whole batch, and in blocks beyond r = 16. A
vanishing pivot is left out, so a singular matrix gives no NaN.

Orthonormal columns from the Gram matrix XᵀX instead of a QR of X ("CholeskyQR2") square the condition number κ of X
(with its columns scaled to length one), so it is done twice: the second Gram matrix is close to the identity, and
corrects what the first has lost. The columns are orthonormal within a few units of rounding; a column that depends on
those before it by more than 1 - r eps (κ above about 1000 in float32, 2e7 in float64) is left out, where a QR would
return a direction made of rounding errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from stable_lora_jax.optim.layouts import other_axes
from stable_lora_jax.optim.pairs import Pair

# What has a shape and a dtype; nothing else is read to find out how leaves are grouped.
Leaf: TypeAlias = Array | jax.ShapeDtypeStruct
# The leaves of a tree, of which only those of pairs are read: others may be anything.
Leaves: TypeAlias = Sequence[Any] | Mapping[int, Any]

# Up to this many columns, loops over them are unrolled, which lets the compiler fuse their steps.
_SMALL = 16


def group_by_shape(pairs: Sequence[Pair], leaves: Leaves) -> list[list[Pair]]:
    """Returns the pairs in groups that have the same rank, fan-in, fan-out and dtypes.

    The order is that of the pairs' names, in the groups and of the groups, so that what is kept of a group from step to
    step meets the same pairs however the tree is wrapped.

    Raises:
      ValueError: a pair whose rank axis the names and shapes leave open.
    """
    groups: dict[Any, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.name):
        if pair.rank_axes is None:
            raise ValueError(
                f"The rank axis of the pair '{pair.name}' is unknown: A {leaves[pair.a].shape} and B "
                f"{leaves[pair.b].shape} can be read as (n, r)/(r, m) and as (r, n)/(m, r). This optimizer needs it: "
                "say it by labels=[PairSpec(a, b, rank_axes=(-1, 0))], or (0, -1) for the second."
            )
        kind = tuple((_sizes(leaves[i], pair, side)[1:], leaves[i].dtype) for side, i in ((0, pair.a), (1, pair.b)))
        groups.setdefault(kind, []).append(pair)
    return list(groups.values())


def factors(
    groups: Sequence[Sequence[Pair]], leaves: Leaves
) -> tuple[list[Float[Array, "_k _r _n"]], list[Float[Array, "_k _r _m"]]]:
    """Returns the factors A and the factors B of every group, from a flattened tree of parameters or gradients."""
    a = [jnp.concatenate([_matrices(leaves[pair.a], pair, 0) for pair in group]) for group in groups]
    b = [jnp.concatenate([_matrices(leaves[pair.b], pair, 1) for pair in group]) for group in groups]
    return a, b


def scatter_updates(
    groups: Sequence[Sequence[Pair]],
    moves: Sequence[Float[Array, "_k _r _rows"]],
    leaves: Sequence[Any],
    params: Sequence[Any],
) -> list[Any]:
    """Returns `leaves` with A and B replaced by `moves`, all A and then all B, in the leaves' shapes.

    Their dtype is that of the parameter or of the leaf, whichever is wider: 16-bit gradients of float32 adapters become
    float32 updates.
    """
    replaced = list(leaves)
    for number, matrices in enumerate(moves):
        side, group = number // len(groups), groups[number % len(groups)]
        start = 0
        for pair in group:
            index = (pair.a, pair.b)[side]
            leaf = leaves[index]
            shape, order = _view(leaf, pair, side)
            stop = start + _sizes(leaf, pair, side)[0]
            moved = matrices[start:stop].reshape([shape[axis] for axis in order])
            moved = jnp.transpose(moved, [order.index(i) for i in range(len(shape))]).reshape(leaf.shape)
            replaced[index] = moved.astype(jnp.promote_types(leaf.dtype, params[index].dtype))
            start = stop
    return replaced


def num_matrices(group: Sequence[Pair], leaves: Leaves) -> int:
    """Returns k, the number of matrices of a group."""
    return sum(_sizes(leaves[pair.a], pair, 0)[0] for pair in group)


def by_pair(
    groups: Sequence[Sequence[Pair]], values: Sequence[Array], leaves: Leaves
) -> dict[str, Shaped[Array, "k *_"]]:
    """Returns pair name -> its part of what is given group by group, with a first axis that counts matrices."""
    parts = {}
    for group, value in zip(groups, values, strict=True):
        start = 0
        for pair in group:
            stop = start + num_matrices([pair], leaves)
            parts[pair.name] = value[start:stop]
            start = stop
    return parts


def gram(x: Float[Array, "k r rows"], y: Float[Array, "k r rows"]) -> Float[Array, "k r r"]:
    """Returns XᵀY, in full precision also where products default to less."""
    return jnp.einsum("kin,kjn->kij", x, y, precision=jax.lax.Precision.HIGHEST)


def times(x: Float[Array, "k r rows"], t: Float[Array, "k r r"]) -> Float[Array, "k r rows"]:
    """Returns X T, in full precision also where products default to less."""
    rank = x.shape[1]
    if rank <= _SMALL:  # a sum that the compiler fuses with what is done before and after
        return sum((t[:, i, :, None] * x[:, i, None, :] for i in range(rank)), jnp.zeros((), x.dtype))
    return jnp.einsum("kin,kij->kjn", x, t, precision=jax.lax.Precision.HIGHEST)


def product(x: Float[Array, "k i r"], y: Float[Array, "k r j"]) -> Float[Array, "k i j"]:
    """Returns x y of small matrices, in full precision also where products default to less."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def transpose(x: Float[Array, "k i j"]) -> Float[Array, "k j i"]:
    """Returns the transpose of every matrix."""
    return jnp.swapaxes(x, -1, -2)


def batched_by_shape(function: Callable[..., Any], *columns: Sequence[Array]) -> list[Any]:
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
    """Returns the inverses of symmetric positive matrices; directions that depend on others are inverted to 0."""
    root = _inverse_root(grams)
    return product(root, transpose(root))


def orthonormalizers(
    xs: Sequence[Float[Array, "_k _r _rows"]],
) -> tuple[list[Float[Array, "_k _r _r"]], list[Float[Array, "_k _r _rows"]]]:
    """Returns for every X a T and X T, whose columns are orthonormal: with X = U R, X T = U and T = R⁻¹.

    Where X loses rank, T leaves out columns that depend on those before them: they are 0 in T and in X T. An X with
    fewer rows than columns always does: there T is its pseudoinverse and U the identity, both filled up with zeros.
    """
    tall = [transpose(x) if _is_wide(x) else x for x in xs]
    first = batched_by_shape(_inverse_root, [gram(x, x) for x in tall])
    nearly = [times(x, t) for x, t in zip(tall, first, strict=True)]
    second = batched_by_shape(_inverse_root, [gram(u, u) for u in nearly])
    maps = [product(t, c) for t, c in zip(first, second, strict=True)]
    bases = [times(u, c) for u, c in zip(nearly, second, strict=True)]
    for number, x in enumerate(xs):
        if _is_wide(x):
            # With Xᵀ = Q S: X⁺ = Q S⁻ᵀ.
            pseudoinverse = product(transpose(bases[number]), transpose(maps[number]))
            maps[number] = jnp.pad(pseudoinverse, [(0, 0), (0, 0), (0, x.shape[1] - x.shape[2])])
            bases[number] = jnp.broadcast_to(jnp.eye(*x.shape[1:], dtype=x.dtype), x.shape)
    return maps, bases


def _is_wide(x: Float[Array, "k r rows"]) -> bool:
    return x.shape[2] < x.shape[1]


def _inverse_root(grams: Float[Array, "k r r"], smallest: Float[Array, "k r"] | None = None) -> Float[Array, "k r r"]:
    """Returns the upper triangular T with TᵀGT = I, from G = LLᵀ and T = L⁻ᵀ; columns of dependent directions are 0.

    Args:
      grams: G, symmetric and not negative.
      smallest: what a pivot must be above for its direction to count as independent; r eps times its start if None.
    """
    rank = grams.shape[-1]
    diagonal = jnp.diagonal(grams, axis1=-2, axis2=-1)
    floor = rank * jnp.finfo(grams.dtype).eps * diagonal if smallest is None else smallest
    if rank > _SMALL:
        # With G = [[P, Q], [Qᵀ, R]]: the root of P, and that of R less what P explains of it.
        half = rank // 2
        upper = _inverse_root(grams[:, :half, :half], floor[:, :half])
        shared = product(transpose(upper), grams[:, :half, half:])
        rest = grams[:, half:, half:] - product(transpose(shared), shared)
        lower = _inverse_root(rest, floor[:, half:])
        corner = -product(product(upper, shared), lower)
        return jnp.block([[upper, corner], [jnp.zeros_like(transpose(corner)), lower]])
    # Elimination turns (G | I) into (Lᵀ | L⁻¹), row by row.
    rows = jnp.concatenate([grams, jnp.broadcast_to(jnp.eye(rank, dtype=grams.dtype), grams.shape)], axis=-1)
    done = jnp.arange(rank)[:, None]
    for j in range(rank):
        row = rows[:, j]
        pivot = row[:, j]
        kept = pivot > floor[:, j]
        row = row * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, pivot, 1)), 0)[:, None]
        below = rows - row[:, :rank, None] * row[:, None, :]
        rows = jnp.where(done < j, rows, jnp.where(done == j, row[:, None, :], below))
    return transpose(rows[:, :, rank:])


def _view(leaf: Leaf, pair: Pair, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape in which a leaf is a stack of matrices, and its axes in the order stack, rank, rows.

    The products of a grouped convolution are a stack: its A is split along the rank, its B along the fan-out. Matrices
    A that share one B are one taller matrix.
    """
    assert pair.rank_axes is not None  # `group_by_shape` has refused such pairs
    shape, rank_axis, stack = tuple(leaf.shape), pair.rank_axes[side], pair.stack_axes_b
    if pair.groups > 1:
        axis = (rank_axis, 0)[side]
        shape = (*shape[:axis], pair.groups, shape[axis] // pair.groups, *shape[axis + 1 :])
        rank_axis, stack = rank_axis + 1, (axis,)
    return shape, (*stack, rank_axis, *other_axes(len(shape), (*stack, rank_axis)))


def _sizes(leaf: Leaf, pair: Pair, side: int) -> tuple[int, int, int]:
    """Returns (k, r, rows) of a leaf."""
    shape, order = _view(leaf, pair, side)
    depth = pair.groups > 1 or len(pair.stack_axes_b)
    sizes = [shape[axis] for axis in order]
    return math.prod(sizes[:depth]), sizes[depth], math.prod(sizes[depth + 1 :])


def _matrices(leaf: Array, pair: Pair, side: int) -> Float[Array, "k r rows"]:
    shape, order = _view(leaf, pair, side)
    wide = jnp.transpose(leaf.reshape(shape), order).astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return wide.reshape(_sizes(leaf, pair, side))
