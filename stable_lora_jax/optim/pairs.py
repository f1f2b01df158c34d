"""Finds the LoRA pairs in a pytree: which leaf is an A, which B belongs to it, and which axes only stack matrices.

An adapter is ``y = x W + s (x A) B`` with A: (n, r), B: (r, m), fan-in n, fan-out m, rank r. Everything in
`stable_lora_jax.optim` that treats A and B differently asks this file, so all of it agrees on what a pair is.

Names. A leaf is an A or a B by the component of its path that reads ``lora_a``/``lora_b`` (Flax, ours),
``lora_A``/``lora_B`` with whatever follows (PEFT: ``lora_A.weight``, ``lora_A.default.weight``), ``*_lora_a`` (Qwix) or
``lora_*_a`` (Keras: ``lora_kernel_a``). A pair is called by that path without the letter: ``layers/q_proj/lora_a`` and
``layers/q_proj/lora_b`` are ``layers/q_proj/lora``. `flax.nnx.Optimizer` shows ``init`` variables, whose paths end in
``.value``, and ``update`` bare arrays: that ending is not part of a name.

Layouts. Stable-LoRA needs Frobenius norms, the ratio n/m, which is numel(A)/numel(B) whatever the orientation, and the
stack axes; Riemannian preconditioning and LoRA-RITE need the rank axes too. So (n, r)/(r, m), PEFT's (r, n)/(m, r) and
einsum adapters such as (D, r)/(r, N, H) are all read from the shapes alone. Stack axes are inferred where exactly one
reading of the shapes shares a rank; otherwise the caller must say them, because a wrong guess would silently merge or
split matrices. Where both orientations share an axis, as with n = m, the rank is the smaller one.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

PyTree: TypeAlias = Any
Labels: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None
StackAxes: TypeAlias = Literal["infer", "leading"] | tuple[int, ...] | Callable[[str], tuple[int, ...]]

LORA_A, LORA_B, OTHER = "lora_a", "lora_b", "other"

_SIDE = re.compile(r"(?P<head>(?:.*[._/])?lora(?:_[A-Za-z0-9_]+)?)_(?P<side>[abAB])(?P<tail>\..*)?")


class Pair(NamedTuple):
    """One adapter: where its two leaves stand in the flattened tree, and how to read their shapes."""

    name: str
    a: int  # index of the leaf A in jax.tree.leaves(tree, is_leaf=is_none)
    b: int
    stack_axes: tuple[int, ...]  # axes, the same in A and B, that count matrices
    fan_ratio: float  # n / m
    rank_axes: tuple[int, int] | None  # the axis of A and the axis of B that is the rank; None: cannot be known


def is_none(node: object) -> bool:
    """Whether `node` is None: frozen entries that some libraries write as None keep their place in our leaf lists."""
    return node is None


def is_placeholder(params: PyTree) -> bool:
    """Whether `optax.tree.map_params` asks `init` which parts of a state are trees like the parameters.

    What is not like them must then be a leaf, as its structure depends on the parameters. Optax's class is private.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def lora_labels(params: PyTree) -> PyTree:
    """Returns a tree like `params` whose leaves are "lora_a", "lora_b" or "other", found by name.

    Args:
      params: any pytree that holds LoRA adapters, alone or among frozen weights.

    Raises:
      ValueError: no adapter was found, or an A has no B or a B has no A (paths listed).

    Example:
      >>> lora_labels({"q_proj": {"kernel": 0.0, "lora_a": 1.0, "lora_b": 2.0}})
      {'q_proj': {'kernel': 'other', 'lora_a': 'lora_a', 'lora_b': 'lora_b'}}
    """
    paths, treedef = _paths(params)
    labels = _labels_by_name(paths)
    _match(paths, labels)
    return jax.tree.unflatten(treedef, labels)


def find_pairs(params: PyTree, labels: Labels = None, stack_axes: StackAxes = "infer") -> tuple[Pair, ...]:
    """Returns every LoRA pair of `params`, in the order of their A leaves.

    Only paths, shapes and dtypes are read, so it works on tracers and on `jax.ShapeDtypeStruct`. Where n = m, shapes
    can be read in both orientations, and the smaller number is taken for the rank: so it must be below n there.

    Args:
      params: pytree of arrays; None and `optax.MaskedNode` holes are passed over. What `optax.tree.map_params` asks
        with has no pairs (`is_placeholder`).
      labels: None (by name), a pytree of "lora_a"/"lora_b"/"other" with the structure of `params` or a prefix of it, or
        a callable from a tree of parameters or updates to such labels. An A and a B of which neither has a name of the
        conventions belong together when a subtree holds just these two; the pair is then called by the path of its A.
      stack_axes: "infer", or the axes that count matrices in every pair in which A and B both have more than two axes:
        ``(0,)`` for layers scanned over axis 0, ``(1,)`` for axis 1, ``()`` for no stack, "leading" for all but the
        last two. A callable from the pair's name says it pair by pair.

    Raises:
      ValueError: no adapter; an A without a B or a B without an A; a vector; ranks that disagree; a layout that can be
        read in more than one way; an unknown label; `stack_axes` that are none of the above.
      TypeError: an adapter that is not of a floating dtype.
    """
    if is_placeholder(params):
        return ()
    paths, _ = _paths(params)
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    found = _labels_by_name(paths) if labels is None else _labels_given(params, paths, leaves, labels)
    pairs = []
    for name, a, b in _match(paths, found):
        for index in (a, b):
            _check_floating(paths[index], leaves[index])
            _check_matrix(paths[index], leaves[index])
        shapes = jnp.shape(leaves[a]), jnp.shape(leaves[b])
        if 0 in (*shapes[0], *shapes[1]):
            raise ValueError(f"The pair '{name}' has an axis of size 0: A {shapes[0]}, B {shapes[1]}. Leave it out.")
        axes = _stack_axes(name, *shapes, stack_axes)
        fan_ratio = math.prod(shapes[0]) / math.prod(shapes[1])
        pairs.append(Pair(name, a, b, axes, fan_ratio, _rank_axes(*shapes, axes)))
    return tuple(pairs)


def matrix_axes(ndim: int, stack_axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes that belong to one matrix: those of `ndim` axes that are not in `stack_axes`."""
    return tuple(axis for axis in range(ndim) if axis not in stack_axes)


def frobenius_norm(matrix: jax.Array, stack_axes: tuple[int, ...]) -> jax.Array:
    """Returns the Frobenius norm of each matrix of a stack, at least in float32; shape: the stack axes' sizes."""
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=matrix_axes(matrix.ndim, stack_axes)))


def _paths(tree: PyTree) -> tuple[list[tuple[str, ...]], Any]:
    """Returns the path of every leaf as strings, without the `.value` of a variable, and the tree's definition."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [_path(keys) for keys, _ in flat], treedef


def _path(keys: Sequence[Any]) -> tuple[str, ...]:
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _parse(path: tuple[str, ...]) -> tuple[str, str] | None:
    """Returns (pair name, "lora_a" or "lora_b") of a path that follows a naming convention, else None."""
    for depth in reversed(range(len(path))):
        if match := _SIDE.fullmatch(path[depth]):
            component = match["head"] + (match["tail"] or "")
            name = "/".join((*path[:depth], component, *path[depth + 1 :]))
            return name, LORA_A if match["side"] in "aA" else LORA_B
    return None


def _labels_by_name(paths: Sequence[tuple[str, ...]]) -> list[str]:
    return [parsed[1] if (parsed := _parse(path)) else OTHER for path in paths]


def _labels_given(params: PyTree, paths: Sequence[tuple[str, ...]], leaves: Sequence[Any], labels: Labels) -> list[str]:
    """Returns one label a leaf from a label tree, in which a label stands for all leaves below its path."""
    tree = labels(params) if callable(labels) else labels
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    by_path = {_path(keys): label for keys, label in flat}
    if unknown := sorted({str(label) for label in by_path.values()} - {LORA_A, LORA_B, OTHER}):
        raise ValueError(f"labels holds {unknown}. Each label must be one of 'lora_a', 'lora_b', 'other'.")
    found = []
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf is None:
            found.append(OTHER)
            continue
        above = next((path[:depth] for depth in range(len(path), -1, -1) if path[:depth] in by_path), None)
        if above is None:
            raise ValueError(
                f"labels has no entry for the parameter {_show([path])}. Every parameter, or a subtree that holds it, "
                "needs a label: give 'other' to what is no adapter."
            )
        found.append(by_path[above])
    return found


def _match(paths: Sequence[tuple[str, ...]], labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns (name, index of A, index of B) of every pair, in the order of the A's."""
    sides = {side: [i for i, label in enumerate(labels) if label == side] for side in (LORA_A, LORA_B)}
    if not sides[LORA_A] and not sides[LORA_B]:
        raise ValueError(
            f"No LoRA adapter found among the parameters {_show(paths)}. Adapters are found by names such as "
            "lora_a/lora_b, lora_A.weight/lora_B.weight, kernel_lora_a/kernel_lora_b or lora_kernel_a/lora_kernel_b; "
            "for other names pass labels=, a tree of 'lora_a', 'lora_b' and 'other' (or a function that makes one)."
        )
    by_name: dict[str, dict[str, list[int]]] = {}
    unnamed: dict[str, list[int]] = {LORA_A: [], LORA_B: []}
    for side, indices in sides.items():
        for index in indices:
            parsed = _parse(paths[index])
            group = by_name.setdefault(parsed[0], {LORA_A: [], LORA_B: []}) if parsed and parsed[1] == side else unnamed
            group[side].append(index)
    whole = {name: group for name, group in by_name.items() if len(group[LORA_A]) == len(group[LORA_B]) == 1}
    pairs = [(name, group[LORA_A][0], group[LORA_B][0]) for name, group in whole.items()]
    pairs += _match_by_subtree(paths, unnamed[LORA_A], unnamed[LORA_B])
    paired = {index for _, a, b in pairs for index in (a, b)}
    alone = {side: [paths[i] for i in indices if i not in paired] for side, indices in sides.items()}
    if alone[LORA_A] or alone[LORA_B]:
        raise ValueError(
            f"Unpaired adapters: A without its B: {_show(alone[LORA_A])}; B without its A: {_show(alone[LORA_B])}. "
            "Every A needs exactly one B with the same path but for the letter (or, with labels= and other names, in "
            "the same subtree): keep both in the tree, or mask both. If one is a bias, label it 'other'."
        )
    return sorted(pairs, key=lambda pair: pair[1])


def _match_by_subtree(
    paths: Sequence[tuple[str, ...]], a_left: list[int], b_left: list[int]
) -> list[tuple[str, int, int]]:
    """Pairs what no name links: an A and a B belong together when they are alone in the smallest shared subtree."""
    pairs = []
    for a in a_left:
        for depth in reversed(range(len(paths[a]))):
            below = [[i for i in left if paths[i][:depth] == paths[a][:depth]] for left in (a_left, b_left)]
            if len(below[0]) == len(below[1]) == 1:
                pairs.append(("/".join(paths[a]), a, below[1][0]))
            if len(below[0]) > 1 or below[1]:
                break
    return pairs


def _check_floating(path: tuple[str, ...], leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"The adapter {_show([path])} is {'a ' + type(leaf).__name__ if dtype is None else dtype}. LoRA matrices "
            "must be arrays of a floating dtype: cast it, or label it 'other' if it is no adapter."
        )


def _check_matrix(path: tuple[str, ...], leaf: Any) -> None:
    if len(jnp.shape(leaf)) < 2:
        raise ValueError(
            f"The adapter {_show([path])} has shape {jnp.shape(leaf)}. LoRA matrices have two axes or more: if it is a "
            "bias, label it 'other' by labels=, or mask it."
        )


def _stack_axes(name: str, a: tuple[int, ...], b: tuple[int, ...], stack_axes: StackAxes) -> tuple[int, ...]:
    """Returns the stack axes of a pair with shapes a and b, checked or inferred."""
    shared = min(len(a), len(b)) - 2
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(shared + 2), size) for size in range(max(shared, 0) + 1)
    )
    readings = [axes for axes in subsets if _shares_rank(a, b, axes)]
    said = stack_axes(name) if callable(stack_axes) else stack_axes
    if said not in ("infer", "leading") and not _are_axes(said):
        raise ValueError(
            f"stack_axes={said!r} is unknown (pair '{name}'). Give 'infer', 'leading', a tuple of axes such as (0,), "
            "or a function from the pair's name to such a tuple."
        )
    if not readings:
        raise ValueError(
            f"The ranks of the pair '{name}' disagree: A has shape {a}, B has shape {b}. Allowed are (n, r)/(r, m), "
            "(r, n)/(m, r), einsum forms such as (D, r)/(r, N, H), and stacks of these; give A and B the same rank r."
        )
    if said == "infer":
        if len(readings) > 1:
            raise ValueError(
                f"The layout of the pair '{name}' is ambiguous: A {a} and B {b} can be stacked over the axes "
                f"{' or '.join(map(str, readings))}. Say which by stack_axes=, e.g. stack_axes={readings[-1]} "
                "(() means no stack), or by a function of the pair's name."
            )
        return readings[0]
    said = range(shared) if said == "leading" else said
    chosen = tuple(said) if shared > 0 else ()
    if chosen not in readings:
        raise ValueError(
            f"stack_axes={chosen} does not fit the pair '{name}' with A {a} and B {b}: possible are "
            f"{' or '.join(map(str, readings))}."
        )
    return chosen


def _are_axes(said: Any) -> bool:
    return isinstance(said, tuple | list) and all(isinstance(axis, int | np.integer) for axis in said)


def _rank_axes(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the axes of A and B that are the rank: last and first, or in torch's orientation first and last."""
    rest_a, rest_b = matrix_axes(len(a), stack_axes), matrix_axes(len(b), stack_axes)
    readings = [(i, j) for i, j in ((rest_a[-1], rest_b[0]), (rest_a[0], rest_b[-1])) if a[i] == b[j]]
    smallest = min(a[i] for i, _ in readings)
    lowest = [axes for axes in readings if a[axes[0]] == smallest]
    return lowest[0] if len(lowest) == 1 else None


def _shares_rank(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...]) -> bool:
    """Whether A and B share a rank axis once the stack axes, which must have equal sizes, are taken away."""
    if any(a[axis] != b[axis] for axis in stack_axes):
        return False
    rest_a = [a[axis] for axis in matrix_axes(len(a), stack_axes)]
    rest_b = [b[axis] for axis in matrix_axes(len(b), stack_axes)]
    if min(len(rest_a), len(rest_b)) < 2:
        return False
    return rest_a[-1] == rest_b[0] or rest_a[0] == rest_b[-1]


def _show(paths: Sequence[tuple[str, ...]], most: int = 12) -> str:
    """Returns the paths for a message, the first dozen of them."""
    shown = ", ".join("'" + "/".join(path) + "'" for path in paths[:most])
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return f"[{shown}{more}]"


def find_states(opt_state: PyTree, kind: type) -> list[Any]:
    """Returns every `kind` inside an optimizer state, however chained, masked, partitioned or wrapped."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def bare(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns name -> array, taking each array out of the variable that `flax.nnx.Optimizer` stores it in."""
    return {name: jax.tree.leaves(value)[0] for name, value in tree.items()}
