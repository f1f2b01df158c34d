"""Reads a compiled GPU program's text: the FLOPs of its products, and the bytes that its kernels read and write.

A described GPU has no cost analysis, and XLA's own counts the body of a loop once. In the text of a GPU program every
instruction outside a fusion is a kernel, or a call of a library: it reads its operands from memory and writes its
results there, whatever happens between the two. Of a stack that a loop cuts a layer from, or puts one into, only that
layer is counted.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stable_lora_jax.planning.program import KINDS, array_bytes, computations, result_bytes, runs_of, trips

_LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([\d", ]+)\]')
_SCRATCH = re.compile(r"\b[su]8\[\d+\]")  # that libraries ask for
_WITHOUT_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
_CALLS = {"call", "while", "conditional", "async-start"}
_VIEWS = {"bitcast", "reshape"}


class _Instruction(NamedTuple):
    """One line: what it is called, what it gives, what it does, and to what."""

    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    line: str
    is_root: bool


def product_flops(text: str) -> int:
    """Returns the FLOPs of a step's matrix products: those of XLA's own kernels, and of cuBLAS.

    What cuDNN's attention computes is not among them.

    Args:
      text: `compiled.as_text()` of a program for a GPU.
    """
    total = 0
    for times, each, program in _executed(text):
        if each.op == "dot" or "__cublas" in each.line:
            contracted = _CONTRACTED.search(each.line)
            if contracted is None:
                raise ValueError(f"A product names no contracted axis: {each.line.strip()[:200]}")
            left = _sizes(program[each.operands[0]].result)
            summed = math.prod(left[int(axis)] for axis in contracted[1].replace('"', "").split(","))
            total += 2 * times * math.prod(_sizes(each.result)) * summed
    return total


def attention_flops(text: str) -> int:
    """Returns the FLOPs of cuDNN's attention: two products forward, and the scores again and four more backward.

    With a causal mask half of each, as the kernels leave out the blocks that it hides; of other masks they do not know.

    Args:
      text: `compiled.as_text()` of a program for a GPU.
    """
    total = 0
    for times, each, program in _executed(text):
        if "__cudnn$fmha" in each.line and each.op.startswith("custom-call"):
            scores = _SCORES.search(each.line)
            if scores is None:
                raise ValueError(f"An attention kernel names no scores: {each.line.strip()[:200]}")
            features = _sizes(program[each.operands[0]].result)[-1]
            products = 5 if "Backward" in each.line else 2
            flops = 2 * products * features * math.prod(map(int, re.findall(r"\d+", scores[1])))
            total += times * flops // (2 if re.search(r'"mask_type": ?"CAUSAL"', each.line) else 1)
    return total


def bytes_moved(text: str) -> int:
    """Returns the bytes that a step's kernels read from memory and write to it.

    No cache is assumed: what two kernels read counts twice. Scratch space of libraries is not counted.

    Args:
      text: `compiled.as_text()` of a program for a GPU.
    """
    entry, bodies = computations(text)
    return _moved(entry, {name: _read(lines) for name, lines in bodies.items()}, bodies)


def _executed(text: str) -> Iterator[tuple[int, _Instruction, Mapping[str, _Instruction]]]:
    """Yields how often each instruction runs in a step, itself, and the computation that it stands in."""
    entry, bodies = computations(text)
    runs, _ = runs_of(entry, bodies)
    for name, lines in bodies.items():
        program = _read(lines) if runs[name] else {}
        for each in program.values():
            yield runs[name], each, program


def _moved(
    name: str, programs: Mapping[str, Mapping[str, _Instruction]], bodies: dict[str, list[str]], times: int = 1
) -> int:
    total = 0
    for each in programs[name].values():
        if each.op in _CALLS:
            repeated = trips(each.line, bodies) if each.op == "while" else 1
            called = [inner for group in _CALLED.findall(each.line) for inner in re.findall(r"[\w.\-]+", group)]
            total += sum(_moved(inner, programs, bodies, repeated) for inner in called)
        else:
            total += _kernel_bytes(each, programs[name], programs)
    return times * total


def _kernel_bytes(
    kernel: _Instruction, program: Mapping[str, _Instruction], programs: Mapping[str, Mapping[str, _Instruction]]
) -> int:
    if kernel.op in _WITHOUT_TRAFFIC or kernel.op.endswith("-done"):
        return 0
    op = kernel.op.removesuffix("-start")
    if op == "fusion" and (called := _CALLED.search(kernel.line)):
        return _fused_bytes(programs[called[1].lstrip("%")])
    if op == "copy":
        return 2 * _bytes_of(kernel.operands[:1], program)
    if op in KINDS:
        return _bytes_of(kernel.operands, program) + result_bytes(kernel.result, op, is_start=op != kernel.op)
    read = sum(_read_bytes(kernel, place, program) for place in range(len(kernel.operands)))
    return read + _written_bytes(kernel, program)


def _fused_bytes(fused: Mapping[str, _Instruction]) -> int:
    """Returns what a fusion reads of its parameters, and writes."""
    read = sum(_used_bytes(each, fused) for each in fused.values() if each.op == "parameter")
    root = next(each for each in fused.values() if each.is_root)
    results = [fused[name] for name in root.operands] if root.op == "tuple" else [root]
    return read + sum(_written_bytes(_behind_views(each, fused), fused) for each in results)


def _used_bytes(array: _Instruction, fused: Mapping[str, _Instruction]) -> int:
    """Returns how much of an array is read: all of it, unless all that is done with it is to cut or fill a part."""
    found = 0
    for user in fused.values():
        for place in (i for i, name in enumerate(user.operands) if name == array.name):
            found += _used_bytes(user, fused) if user.op in _VIEWS else _read_bytes(user, place, fused)
    return min(found, array_bytes(array.result))


def _read_bytes(kernel: _Instruction, place: int, program: Mapping[str, _Instruction]) -> int:
    """Returns how much of an operand is read."""
    if kernel.op in ("dynamic-slice", "slice", "gather") and place == 0:
        return array_bytes(kernel.result)
    if kernel.op == "dynamic-update-slice" and place == 0:
        return 0  # the rest stays where it is
    if kernel.op == "tuple":
        return 0
    return _bytes_of(kernel.operands[place : place + 1], program)


def _written_bytes(kernel: _Instruction, program: Mapping[str, _Instruction]) -> int:
    if kernel.op == "dynamic-update-slice":
        return _bytes_of(kernel.operands[1:2], program)
    if kernel.op == "parameter":
        return 0
    of_library = kernel.op in ("custom-call", "get-tuple-element")
    return array_bytes(_SCRATCH.sub("", kernel.result) if of_library else kernel.result)


def _behind_views(array: _Instruction, fused: Mapping[str, _Instruction]) -> _Instruction:
    while array.op in _VIEWS and array.operands[0] in fused:
        array = fused[array.operands[0]]
    return array


def _bytes_of(names: Sequence[str], program: Mapping[str, _Instruction]) -> int:
    return sum(array_bytes(program[name].result) for name in names)


def _read(lines: Sequence[str]) -> dict[str, _Instruction]:
    """Returns name -> instruction."""
    return {each.name: each for each in _instructions(lines)}


def _instructions(lines: Sequence[str]) -> Iterator[_Instruction]:
    for line in lines:
        if match := _LINE.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", _until_closed(match["rest"])))
            yield _Instruction(match["name"], match["type"], match["op"], operands, line, bool(match["root"]))


def _until_closed(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def _sizes(shape: str) -> list[int]:
    """Returns the sizes of an array, or of a tuple's first."""
    found = re.search(r"\[([\d,]*)\]", shape)
    if found is None:
        raise ValueError(f"{shape!r} is no array.")
    return [int(size) for size in found[1].split(",") if size]
