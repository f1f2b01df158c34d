r"""How the shapes of an A and a B are read: which axes count matrices, and which axis of each is the rank.

One matrix has fan-in n, fan-out m and rank r, and further axes belong to the fan-in of A or the fan-out of B:

| orientation | A | B | met in |
|---|---|---|---|
| flax | (\*n, r) | (r, \*m) or (1, ..., 1, r, m) | dense, einsum and convolution layers of Flax, Qwix, Keras |
| torch | (r, \*n) | (\*m, r) or (m, r, 1, ..., 1) | PEFT's Linear, Conv1d and Conv2d; levanter |

PEFT's grouped convolutions are block diagonal: A (r, n, k, k), B (m, r/g, 1, 1) are g products of rank r/g.

What is settled by what. Axes that count matrices (layers scanned over, experts) must have equal sizes in A and B. The
orientation is that of the naming convention where it has one. The other orientation is tried where the convention's own
does not fit, and is accepted if its rank is low, r <= min(n, m). Without a convention both are tried, and low ranks go
first. What then has two readings is refused, and the caller says which it is: a wrong guess would silently merge or
split matrices, or precondition with the wrong Gram matrix.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from stable_lora_jax.optim.names import Name, Orientation

Shape: TypeAlias = tuple[int, ...]
StackAxes: TypeAlias = Literal["infer", "leading"] | tuple[int, ...] | Callable[[str], tuple[int, ...]]


class Layout(NamedTuple):
    """How the axes of one pair's A and B are read."""

    stack_axes: tuple[int, ...]  # axes of A that count matrices
    stack_axes_b: tuple[int, ...]  # the same axes of B, or () where the matrices A share one B
    rank_axes: tuple[int, int] | None  # the axis of A and the axis of B that is the rank; None: shapes leave it open
    groups: int = 1  # of a grouped convolution


class Reading(NamedTuple):
    """One way to read both shapes."""

    stack_axes: tuple[int, ...]
    rank_axes: tuple[int, int]
    orientation: Orientation
    rank: int
    fans: tuple[int, int]  # n and m
    groups: int
    flat: bool  # whether A and B are matrices but for their stack axes

    @property
    def low_rank(self) -> bool:
        """Whether r <= min(n, m)."""
        return self.rank <= min(self.fans)


def read_layout(
    name: str, shapes: tuple[Shape, Shape], stack_axes: StackAxes, named: Name | None, for_this_pair: bool
) -> Layout:
    """Returns how a pair's shapes are read, by what was said, its naming convention, and the sizes, in this order.

    Args:
      name: the pair's name, for messages and for `stack_axes`.
      shapes: those of A and B.
      stack_axes: as in `find_pairs`.
      named: what the path of A says, None if it follows no convention.
      for_this_pair: whether `stack_axes` was said of this pair alone; a function always is.

    Raises:
      ValueError: `stack_axes` is none of these or does not fit, ranks disagree, or there is more than one reading.
    """
    a, b = shapes
    said = stack_axes(name) if callable(stack_axes) else stack_axes
    for_this_pair = for_this_pair or callable(stack_axes)
    if said not in ("infer", "leading") and not _are_axes(said):
        raise ValueError(
            f"stack_axes={said!r} is unknown (pair '{name}'). Give 'infer', 'leading', a tuple of axes such as (0,), "
            "or a function from the pair's name to such a tuple."
        )
    orientation = named.orientation if named else None
    readings = _all_readings(a, b, orientation)
    stacks = {reading.stack_axes for reading in readings}
    many = range(min(len(a), len(b)) - 2)
    if said == "infer":
        chosen = _choose_stack(readings, a)
    else:
        chosen = tuple(many if said == "leading" else said if many else ())
    if for_this_pair and not isinstance(said, str) and said and chosen not in (stacks if many else ()):
        if shared := _shared_b(shapes, tuple(said), orientation):
            return shared
        chosen = tuple(said) if len(a) > 2 else chosen
    if not readings:
        raise ValueError(
            f"The ranks of the pair '{name}' disagree: A has shape {a}, B has shape {b}. Allowed are (n, r)/(r, m), "
            "(r, n)/(m, r), einsum forms such as (D, r)/(r, N, H), convolutions, and stacks of these, with a low rank "
            "that both share. If the shapes mean something else, say it by labels=[PairSpec(...)] with rank_axes."
        )
    if chosen is None:
        options = sorted(stacks)
        raise ValueError(
            f"The layout of the pair '{name}' is ambiguous: A {a} and B {b} can be stacked over the axes "
            f"{' or '.join(map(str, options))}. Say which by stack_axes=, e.g. stack_axes={options[-1]} "
            "(() means no stack), or by a function of the pair's name."
        )
    if chosen not in stacks:
        raise ValueError(
            f"stack_axes={chosen} does not fit the pair '{name}' with A {a} and B {b}: possible are "
            f"{' or '.join(map(str, sorted(stacks)))}."
        )
    if isinstance(said, str) or not (for_this_pair or said == ()):
        _check_einsum(name, shapes, chosen, named)
    readings = [reading for reading in readings if reading.stack_axes == chosen]
    groups = {reading.groups for reading in readings}
    return Layout(chosen, chosen, _rank_axes_of(readings, shapes), groups.pop() if len(groups) == 1 else 1)


def axes_of_sizes(
    name: str, shapes: tuple[Shape, Shape], sizes: tuple[int, ...], named: Name | None
) -> list[tuple[int, ...]]:
    """Returns every choice of stack axes of these sizes under which the shapes can be read."""
    a = shapes[0]
    fitting = []
    for axes in itertools.combinations(range(len(a)), len(sizes)):
        if tuple(a[axis] for axis in axes) != sizes:
            continue
        try:
            read_layout(name, shapes, axes, named, for_this_pair=True)
        except ValueError:
            continue
        fitting.append(axes)
    return fitting


def layout_with_ranks(
    name: str, shapes: tuple[Shape, Shape], stack_axes: tuple[int, ...], rank_axes: tuple[int, int]
) -> Layout:
    """Returns the layout of a pair whose rank axes were said, as by a `PairSpec`; refuses what does not fit."""
    a, b = shapes
    in_range = all(-len(shape) <= axis < len(shape) for shape, axis in zip(shapes, rank_axes, strict=True))
    ranks = rank_axes[0] % len(a), rank_axes[1] % len(b)
    in_a = set(stack_axes) <= set(range(len(a))) - {ranks[0]} and len(a) - len(stack_axes) > 1
    in_b = all(axis < len(b) and axis != ranks[1] and a[axis] == b[axis] for axis in stack_axes) if in_a else False
    stack_b = stack_axes if in_b and len(b) - len(stack_axes) > 1 else ()
    fits = in_range and in_a and a[ranks[0]] == b[ranks[1]] and (stack_b == stack_axes or len(b) == 2)
    if not fits:
        raise ValueError(
            f"PairSpec does not fit the pair '{name}' with A {a} and B {b}: rank_axes={rank_axes} must be axes of the "
            f"same size, and stack_axes={stack_axes} other axes of A, of the same sizes in B unless B is a matrix."
        )
    return Layout(stack_axes, stack_b, ranks)


def _shared_b(
    shapes: tuple[Shape, Shape], stack_axes: tuple[int, ...], orientation: Orientation | None
) -> Layout | None:
    """Returns the layout of matrices A, stacked over `stack_axes`, that share the one matrix B; None if it has none."""
    a, b = shapes
    where = other_axes(len(a), stack_axes)
    if len(where) < 2:
        return None
    inner = tuple(a[axis] for axis in where)
    readings = [reading for reading in _all_readings(inner, b, orientation) if reading.stack_axes == ()]
    if not readings:
        return None
    ranks = _rank_axes_of(readings, (inner, b))
    return Layout(stack_axes, (), (where[ranks[0]], ranks[1]) if ranks else None)


def other_axes(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    """Returns those of `ndim` axes that are not in `axes`, in order."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


def _all_readings(a: Shape, b: Shape, orientation: Orientation | None) -> list[Reading]:
    """Returns every way to read the shapes `a` and `b` that the orientation of their names allows."""
    most = min(len(a), len(b)) - 2
    subsets = [axes for size in range(most + 1) for axes in itertools.combinations(range(most + 2), size)]
    stacks = [axes for axes in subsets if all(a[axis] == b[axis] for axis in axes)]
    found = [reading for axes in stacks for reading in _read_matrix(a, b, axes, grouped=orientation == "torch")]
    if orientation is not None:
        own = [reading for reading in found if reading.orientation == orientation]
        return own or [reading for reading in found if reading.low_rank]
    low = [reading for reading in found if reading.low_rank]
    return low or [reading for reading in found if reading.flat and reading.rank <= max(reading.fans)]


def _read_matrix(a: Shape, b: Shape, stack_axes: tuple[int, ...], grouped: bool) -> list[Reading]:
    """Returns the readings of A and B without their stack axes, at most one for each orientation."""
    rest_a, rest_b = list(other_axes(len(a), stack_axes)), list(other_axes(len(b), stack_axes))
    kernel = len(rest_b) > 2
    candidates: list[tuple[Orientation, int, int]] = [
        ("flax", rest_a[-1], rest_b[0]),
        ("torch", rest_a[0], rest_b[-1]),
    ]
    if kernel and all(b[axis] == 1 for axis in rest_b[:-2]):
        candidates.append(("flax", rest_a[-1], rest_b[-2]))
    one_by_one = kernel and all(b[axis] == 1 for axis in rest_b[2:])
    if one_by_one:
        candidates.append(("torch", rest_a[0], rest_b[1]))
    readings: dict[Orientation, Reading] = {}
    for orientation, i, j in candidates:
        groups = 1
        if a[i] != b[j]:
            groups = a[i] // b[j]
            is_grouped = grouped and one_by_one and j == rest_b[1] and len(rest_a) == len(rest_b)
            if not is_grouped or groups * b[j] != a[i] or b[rest_b[0]] % groups:
                continue
        fan_in = math.prod(a[axis] for axis in rest_a) // a[i]
        fan_out = math.prod(b[axis] for axis in rest_b) // b[j]
        flat = len(rest_a) == len(rest_b) == 2
        reading = Reading(stack_axes, (i, j), orientation, a[i], (fan_in, fan_out), groups, flat)
        readings.setdefault(orientation, reading)
    return list(readings.values())


def _choose_stack(readings: Sequence[Reading], a: Shape) -> tuple[int, ...] | None:
    """Returns the stack axes that all readings agree on, or None.

    Axes of size 1 make no difference: they are part of the stack where they lead, as with one layer, and of the kernel
    where they do not, as in a convolution of width 1.
    """
    stacks = {reading.stack_axes for reading in readings}
    if len({tuple(axis for axis in axes if a[axis] > 1) for axes in stacks}) != 1:
        return None
    leading = [axes for axes in stacks if axes == tuple(range(len(axes)))]
    return max(leading, key=len) if leading else min(stacks, key=len)


def _rank_axes_of(readings: Sequence[Reading], shapes: tuple[Shape, Shape]) -> tuple[int, int] | None:
    """Returns the rank axes of the readings that are left for one stack, or None where they differ.

    A reading by convention whose rank is not low is doubtful if the other orientation's would be: matrices under
    another library's names look like that.
    """
    if len({reading.rank_axes for reading in readings}) != 1:
        return None
    (reading,) = readings
    if reading.flat and not reading.low_rank:
        others = _read_matrix(*shapes, reading.stack_axes, grouped=False)
        if any(other.low_rank for other in others):
            return None
    return reading.rank_axes


def _check_einsum(name: str, shapes: tuple[Shape, Shape], stack_axes: tuple[int, ...], named: Name | None) -> None:
    """Refuses Qwix's adapters of an einsum where only the einsum tells what the axes of A are."""
    a, b = shapes
    inner = other_axes(len(a), stack_axes)
    if named is None or named.qwix_weight is None or len(inner) < 3 or len(b) - len(stack_axes) != 2:
        return
    if named.qwix_weight == "kernel" and len(inner) > 3:  # a convolution
        return
    fan_in, matrices = math.prod(a[axis] for axis in inner[:-1]), a[inner[0]]
    raise ValueError(
        f"The layout of the pair '{name}' is ambiguous: Qwix makes A {a} and B {b} both for a layer that sums over the "
        f"axes {inner[:-1]} of A, as an attention's output projection or a convolution does (one matrix, fan-in "
        f"{fan_in}), and for an einsum that keeps axis {inner[0]}, as experts do ({matrices} matrices A of fan-in "
        f"{fan_in // matrices} that share B). Say stack_axes=() if nothing is stacked in this model, or a function "
        f"of the pair's name that returns {(*stack_axes, inner[0])} for experts, else {stack_axes}."
    )


def _are_axes(said: Any) -> bool:
    return isinstance(said, tuple | list) and all(isinstance(axis, int | np.integer) for axis in said)
