"""Reads a compiled XLA program's text: which collectives it runs, on which chips, how often, and with how many bytes.

XLA's own cost analysis counts the body of a loop once and says nothing about collectives. The text tells every loop's
trip count, as a note of the compiler's or as the bound that its condition compares with, so what stands in a body is
counted as often as it runs. The TPU compiler writes one collective several times where it overlaps it with several
other operations; the copies share a channel and are counted once.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\(")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


class Collective(NamedTuple):
    """One collective instruction of a program.

    Attributes:
      kind: one of `KINDS`.
      group: partitions of the first group that takes part; all groups look alike.
      runs: how often it runs in a step.
      result_bytes: of its result on one chip, in one run.
      in_loop: whether it stands inside a loop.
    """

    kind: str
    group: tuple[int, ...]
    runs: int
    result_bytes: int
    in_loop: bool

    @property
    def received_bytes(self) -> float:
        """Bytes that one chip receives in all runs, by the algorithm that moves the least."""
        members = len(self.group)
        factor = {
            "all-gather": (members - 1) / members,
            "all-reduce": 2 * (members - 1) / members,
            "reduce-scatter": members - 1,  # its result is one of as many parts
            "all-to-all": (members - 1) / members,
            "collective-permute": 1,
        }[self.kind]
        return factor * self.result_bytes * self.runs


class _Called(NamedTuple):
    """A computation that an instruction calls, how often, and whether as a loop's body."""

    name: str
    times: int
    is_loop: bool


def read_collectives(text: str, partitions: int) -> list[Collective]:
    """Returns the collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      partitions: number of chips that it runs on: a collective that names no group joins all.
    """
    entry, bodies = computations(text)
    runs, looped = runs_of(entry, bodies)
    found: dict[str, Collective] = {}
    for name, lines in bodies.items():
        for line in lines if runs[name] else ():
            match = _INSTRUCTION.match(line)
            kind = match["op"].removesuffix("-start") if match else ""
            if match and kind in KINDS and len(group := _group(line, partitions)) > 1:
                size = result_bytes(match["type"], kind, is_start=match["op"].endswith("-start"))
                channel = _CHANNEL.search(line)
                key = channel[1] if channel else line
                found[key] = Collective(kind, group, runs[name], size, name in looped)
    return list(found.values())


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the entry's name, and the lines of every computation."""
    entry, bodies, current = "", {}, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            current.append(line)
    return entry, bodies


def runs_of(entry: str, bodies: dict[str, list[str]]) -> tuple[Counter[str], set[str]]:
    """Returns how often each computation runs in a step, and which run inside a loop."""
    calls = {name: [called for line in lines for called in _called(line, bodies)] for name, lines in bodies.items()}
    runs: Counter[str] = Counter()
    looped: set[str] = set()

    def visit(name: str, times: int, in_loop: bool) -> None:
        runs[name] += times
        looped.update({name} if in_loop else ())
        for called in calls.get(name, ()):
            visit(called.name, times * called.times, in_loop or called.is_loop)

    visit(entry, 1, False)
    return runs, looped


def _called(line: str, bodies: dict[str, list[str]]) -> Iterator[_Called]:
    is_loop = " while(" in line
    times = trips(line, bodies) if is_loop else 1
    for name in _CALLED.findall(line):
        yield _Called(name, times, is_loop)


def trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns how often a loop runs; 1 if nothing tells."""
    if told := _TRIPS.search(line):
        return int(told[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = _BOUND.findall("\n".join(bodies.get(condition[1], ()))) if condition else []
    return int(bounds[0]) if len(bounds) == 1 else 1


def result_bytes(result: str, kind: str, *, is_start: bool) -> int:
    """Returns the bytes of a collective's result on one chip."""
    sizes = _array_sizes(result)
    if not is_start or kind == "all-reduce":
        return sum(sizes)
    # The start of an asynchronous collective returns operands, results, and then perhaps scalars for its own use.
    arrays = [size for size, (_, dims) in zip(sizes, _shapes(result), strict=True) if dims]
    return sum(arrays[len(arrays) // 2 :])


def array_bytes(result: str) -> int:
    """Returns the bytes of an instruction's result: of an array, or of all arrays of a tuple."""
    return sum(_array_sizes(result))


def _array_sizes(result: str) -> list[int]:
    return [_bits(dtype) * math.prod(map(int, filter(None, dims.split(",")))) // 8 for dtype, dims in _shapes(result)]


def _shapes(result: str) -> list[tuple[str, str]]:
    return _SHAPE.findall(result)


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _group(line: str, partitions: int) -> tuple[int, ...]:
    if match := _PAIRS.search(line):
        return int(match[1]), int(match[2])
    if match := _MESH_GROUPS.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        inside = set(re.findall(r"'(\w+)'", match[2]))
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return tuple(ids[tuple(slice(None) if name in inside else 0 for name in sizes)].flatten().tolist())
    if match := _IOTA_GROUPS.search(line):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return tuple(ids.transpose(order or range(len(dims))).reshape(shape)[0].tolist())
    if match := _GROUPS.search(line):
        return tuple(map(int, filter(None, match[1].split(","))))
    return tuple(range(partitions))
