"""Finds the LoRA pairs in a pytree: which leaf is an A, which B belongs to it, and how both are read.

An adapter is ``y = x W + s (x A) B`` with A: (n, r), B: (r, m), fan-in n, fan-out m, rank r. Everything in
`stable_lora_jax.optim` that treats A and B differently asks this file, so all of it agrees on what a pair is. Names are
read in `names`, shapes in `layouts`. Stable-LoRA needs Frobenius norms, the ratio n/m, and the axes that count
matrices; Riemannian preconditioning and LoRA-RITE need the rank axes too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from stable_lora_jax.optim.layouts import StackAxes, axes_of_sizes, layout_with_ranks, other_axes, read_layout
from stable_lora_jax.optim.names import (
    LORA_A,
    LORA_B,
    OTHER,
    Path,
    key_path,
    leaf_paths,
    parse_name,
    show_paths,
)

PyTree: TypeAlias = Any


class PairSpec(NamedTuple):
    """One pair said by hand, for trees whose names follow no convention.

    Attributes:
      a, b: paths of the leaves, components joined by "/", as messages show them: "q/down/w", or "1" in a flat list.
      stack_axes: axes of A that count matrices. B has the same axes, or is a matrix that all of them share. None leaves
        it to the argument `stack_axes`, or means () where `rank_axes` are said.
      rank_axes: (axis of A, axis of B) that is the rank; None reads it from the shapes.
    """

    a: str
    b: str
    stack_axes: tuple[int, ...] | None = None
    rank_axes: tuple[int, int] | None = None


Labels: TypeAlias = PyTree | Sequence[PairSpec] | Callable[[PyTree], PyTree] | None


class Pair(NamedTuple):
    """One adapter: where its two leaves are in the flattened tree, and how to read their shapes."""

    name: str
    a: int  # index of the leaf A in jax.tree.leaves(tree, is_leaf=is_none)
    b: int
    fan_ratio: float  # n / m
    stack_axes: tuple[int, ...]  # axes of A that count matrices
    stack_axes_b: tuple[int, ...]  # the same axes of B, or () where the matrices A share one B
    rank_axes: tuple[int, int] | None  # the axis of A and the axis of B that is the rank; None: cannot be known
    groups: int  # of a grouped convolution, else 1


def is_none(node: object) -> bool:
    """Returns whether `node` is None: entries that some libraries write as None keep their place in our leaf lists."""
    return node is None


def is_placeholder(params: PyTree) -> bool:
    """Returns whether `optax.tree.map_params` asks `init` which parts of a state are trees like the parameters.

    Everything else in the state must then be a single leaf, as its structure depends on the parameters. Optax's class
    is private.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def lora_labels(params: PyTree) -> PyTree:
    """Returns a tree like `params` whose leaves are "lora_a", "lora_b" or "other", found by name.

    Args:
      params: any pytree that contains LoRA adapters, alone or among frozen weights.

    Raises:
      ValueError: no adapter was found, or an A has no B or a B has no A (paths listed).

    Examples:
      >>> lora_labels({"q_proj": {"kernel": 0.0, "lora_a": 1.0, "lora_b": 2.0}})
      {'q_proj': {'kernel': 'other', 'lora_a': 'lora_a', 'lora_b': 'lora_b'}}
    """
    paths, leaves = leaf_paths(params), jax.tree.leaves(params, is_leaf=is_none)
    labels = _labels_by_name(paths, leaves)
    _match(paths, labels)
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_none), labels)


def find_pairs(params: PyTree, labels: Labels = None, stack_axes: StackAxes = "infer") -> tuple[Pair, ...]:
    """Returns every LoRA pair of `params`, in the order of their A leaves.

    Only paths, shapes and dtypes are read, so it works on tracers and on `jax.ShapeDtypeStruct`.

    Args:
      params: pytree of arrays; None and `optax.MaskedNode` holes, and whatever else is no adapter (functions, strings,
        integers, random keys) are passed over. What `optax.tree.map_params` asks with has no pairs (`is_placeholder`).
      labels: None (by name; see `names`), a pytree of "lora_a"/"lora_b"/"other" with the structure of `params` or a
        prefix of it, a list of `PairSpec`, or a callable from a tree of parameters or updates to such labels. With a
        pytree of labels, an A and a B of which neither has a name of the conventions belong together when a subtree
        holds just these two; the pair is then called by the path of its A.
      stack_axes: "infer", or the axes that count matrices in every pair in which A and B both have more than two axes:
        ``(0,)`` for layers scanned over axis 0, ``(1,)`` for axis 1, ``()`` for no stack, "leading" for all but the
        last two. A callable from the pair's name says it pair by pair; if it names axes of an A whose B lacks them, as
        with the experts of an einsum, the matrices A share that B.

    Raises:
      ValueError: no adapter; an A without a B or a B without an A; a vector; ranks that disagree; a layout that can be
        read in more than one way; an unknown label or path; `stack_axes` that are none of the above.
      TypeError: an adapter that is not of a floating dtype.

    Examples:
      >>> flat = [jnp.ones((64, 64)), jnp.ones((64, 8)), jnp.ones((8, 64))]
      >>> [(pair.a, pair.b, pair.fan_ratio) for pair in find_pairs(flat, labels=[PairSpec("1", "2")])]
      [(1, 2, 1.0)]
    """
    if is_placeholder(params):
        return ()
    paths, leaves = leaf_paths(params), jax.tree.leaves(params, is_leaf=is_none)
    said = labels(params) if callable(labels) else labels
    if specs := _specs(said):
        found = _match_specs(paths, specs)
    else:
        each = _labels_by_name(paths, leaves) if said is None else _labels_given(paths, leaves, said)
        found = [(*match, None) for match in _match(paths, each)]
    pairs = []
    for name, a, b, spec in found:
        for index in (a, b):
            _check_floating(paths[index], leaves[index])
            _check_matrix(paths[index], leaves[index])
        shapes = jnp.shape(leaves[a]), jnp.shape(leaves[b])
        if 0 in (*shapes[0], *shapes[1]):
            raise ValueError(f"The pair '{name}' has an axis of size 0: A {shapes[0]}, B {shapes[1]}. Leave it out.")
        if spec and spec.rank_axes:
            layout = layout_with_ranks(name, shapes, spec.stack_axes or (), spec.rank_axes)
        elif spec and spec.stack_axes is not None:
            layout = read_layout(name, shapes, spec.stack_axes, parse_name(paths[a]), for_this_pair=True)
        else:
            layout = read_layout(name, shapes, stack_axes, parse_name(paths[a]), for_this_pair=False)
        a_sizes, b_sizes = (
            [shape[axis] for axis in other_axes(len(shape), axes)]
            for shape, axes in zip(shapes, (layout.stack_axes, layout.stack_axes_b), strict=True)
        )
        ratio = math.prod(a_sizes) / math.prod(b_sizes)
        pairs.append(Pair(name, a, b, ratio, layout.stack_axes, layout.stack_axes_b, layout.rank_axes, layout.groups))
    return tuple(pairs)


def find_pairs_of_state(
    params: PyTree, labels: Labels, stack_axes: StackAxes, stacks: Mapping[str, tuple[int, ...]]
) -> tuple[Pair, ...]:
    """Returns `find_pairs`, where the sizes of the stack axes are known: they settle what shapes alone leave open.

    Args:
      params, labels, stack_axes: as in `find_pairs`.
      stacks: pair name -> sizes of its stack axes, as the shapes of the flags in an optimizer state tell.
    """
    paths, leaves = leaf_paths(params), jax.tree.leaves(params, is_leaf=is_none)

    def axes(name: str) -> Any:
        said = stack_axes(name) if callable(stack_axes) else stack_axes
        if said != "infer" or name not in stacks:
            return said
        _, a, b = next(match for match in matches if match[0] == name)
        shapes = jnp.shape(leaves[a]), jnp.shape(leaves[b])
        fitting = axes_of_sizes(name, shapes, stacks[name], parse_name(paths[a]))
        return fitting[0] if len(fitting) == 1 else said

    said = labels(params) if callable(labels) else labels
    if _specs(said) or (stack_axes != "infer" and not callable(stack_axes)):
        return find_pairs(params, labels, stack_axes)
    each = _labels_by_name(paths, leaves) if said is None else _labels_given(paths, leaves, said)
    matches = _match(paths, each)
    return find_pairs(params, labels, axes)


def check_updates(updates: PyTree, params: PyTree) -> None:
    """Raises a ValueError unless `updates` has a leaf or None for every leaf of `params`."""
    counts = [len(jax.tree.leaves(tree, is_leaf=is_none)) for tree in (updates, params)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"The updates have {counts[0]} leaves and the parameters {counts[1]}. Pass trees of the same structure; "
            "None may stand for the update of a parameter that does not move."
        )


def frobenius_norm(matrix: jax.Array, stack_axes: tuple[int, ...]) -> jax.Array:
    """Returns the Frobenius norm of each matrix of a stack, at least in float32; shape: the stack axes' sizes."""
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=other_axes(matrix.ndim, stack_axes)))


def find_states(opt_state: PyTree, kind: type) -> list[Any]:
    """Returns every `kind` inside an optimizer state, however chained, masked, partitioned or wrapped."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def unwrap_variables(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns name -> array, taking each array out of the variable that `flax.nnx.Optimizer` stores it in."""
    return {name: jax.tree.leaves(value)[0] for name, value in tree.items()}


def _labels_by_name(paths: Sequence[Path], leaves: Sequence[Any]) -> list[str]:
    named = [None if leaf is None else parse_name(path) for path, leaf in zip(paths, leaves, strict=True)]
    return [name.side if name else OTHER for name in named]


def _labels_given(paths: Sequence[Path], leaves: Sequence[Any], labels: PyTree) -> list[str]:
    """Returns one label per leaf from a label tree, in which a label stands for all leaves below its path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(labels)
    by_path = {key_path(keys): label for keys, label in flat}
    if unknown := sorted({str(label) for label in by_path.values()} - {LORA_A, LORA_B, OTHER}):
        raise ValueError(
            f"labels holds {unknown}. Each label must be one of 'lora_a', 'lora_b', 'other'; or give PairSpecs."
        )
    found = []
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf is None:
            found.append(OTHER)
            continue
        above = next((path[:depth] for depth in range(len(path), -1, -1) if path[:depth] in by_path), None)
        if above is None:
            raise ValueError(
                f"labels has no entry for the parameter {show_paths([path])}. Every parameter, or a subtree that holds "
                "it, needs a label: give 'other' to what is no adapter."
            )
        found.append(by_path[above])
    return found


def _specs(labels: Any) -> list[PairSpec]:
    """Returns the list of specifications, or [] if the labels are no such list."""
    given = [labels] if isinstance(labels, PairSpec) else list(labels) if isinstance(labels, list | tuple) else []
    return given if given and all(isinstance(each, PairSpec) for each in given) else []


def _match_specs(paths: Sequence[Path], specs: Sequence[PairSpec]) -> list[tuple[str, int, int, PairSpec]]:
    """Returns (name, index of A, index of B, specification) of every pair, in the order of the A's."""
    by_path = {"/".join(path): index for index, path in enumerate(paths)}
    said = [str(path) for spec in specs for path in (spec.a, spec.b)]
    if unknown := [path for path in said if path not in by_path]:
        raise ValueError(f"PairSpec names {unknown}, which params lack. The parameters are {show_paths(paths)}.")
    if twice := sorted({path for path in said if said.count(path) > 1}):
        raise ValueError(f"PairSpec names {twice} more than once. Every leaf belongs to one pair.")
    found = [(spec, by_path[str(spec.a)], by_path[str(spec.b)]) for spec in specs]
    names = [name.pair if (name := parse_name(paths[a])) else "/".join(paths[a]) for _, a, _ in found]
    if len(set(names)) != len(names):  # names that conventions read alike, such as `lora_A` and `lora_a`
        names = ["/".join(paths[a]) for _, a, _ in found]
    return sorted(((n, a, b, spec) for n, (spec, a, b) in zip(names, found, strict=True)), key=lambda each: each[1])


def _match(paths: Sequence[Path], labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns (name, index of A, index of B) of every pair, in the order of the A's."""
    sides = {side: [i for i, label in enumerate(labels) if label == side] for side in (LORA_A, LORA_B)}
    if not sides[LORA_A] and not sides[LORA_B]:
        raise ValueError(
            f"No LoRA adapter found among the parameters {show_paths(paths)}. Adapters are found by names such as "
            "lora_a/lora_b, lora_A.weight/lora_B.weight, lora_down.weight/lora_up.weight, kernel_lora_a/kernel_lora_b, "
            "lora_kernel_a/lora_kernel_b or lora/a and lora/b; for other names pass labels=, a tree of 'lora_a', "
            "'lora_b' and 'other', a function that makes one, or a list of PairSpec."
        )
    by_name: dict[str, dict[str, list[int]]] = {}
    unnamed: dict[str, list[int]] = {LORA_A: [], LORA_B: []}
    for side, indices in sides.items():
        for index in indices:
            name = parse_name(paths[index])
            known = name is not None and name.side == side
            group = by_name.setdefault(name.pair, {LORA_A: [], LORA_B: []}) if name and known else unnamed
            group[side].append(index)
    whole = {name: group for name, group in by_name.items() if len(group[LORA_A]) == len(group[LORA_B]) == 1}
    pairs = [(name, group[LORA_A][0], group[LORA_B][0]) for name, group in whole.items()]
    pairs += _match_by_subtree(paths, unnamed[LORA_A], unnamed[LORA_B])
    paired = {index for _, a, b in pairs for index in (a, b)}
    alone = {side: [paths[i] for i in indices if i not in paired] for side, indices in sides.items()}
    if alone[LORA_A] or alone[LORA_B]:
        raise ValueError(
            f"Unpaired adapters: A without its B: {show_paths(alone[LORA_A])}; B without its A: "
            f"{show_paths(alone[LORA_B])}. Every A needs exactly one B with the same path but for the letter (or, with "
            "labels= and other names, in the same subtree): keep both in the tree, or mask both. If one is a bias, "
            "label it 'other'."
        )
    return sorted(pairs, key=lambda pair: pair[1])


def _match_by_subtree(paths: Sequence[Path], a_left: list[int], b_left: list[int]) -> list[tuple[str, int, int]]:
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


def _check_floating(path: Path, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"The adapter {show_paths([path])} is {'a ' + type(leaf).__name__ if dtype is None else dtype}. LoRA "
            "matrices must be arrays of a floating dtype: cast it, or label it 'other' if it is no adapter."
        )


def _check_matrix(path: Path, leaf: Any) -> None:
    if len(jnp.shape(leaf)) < 2:
        raise ValueError(
            f"The adapter {show_paths([path])} has shape {jnp.shape(leaf)}. LoRA matrices have two axes or more: if it "
            "is a bias, label it 'other' by labels=, or mask it."
        )
