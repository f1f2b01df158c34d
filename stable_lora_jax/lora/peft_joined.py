"""Adapters of projections that are one module in PyTorch and several here, as Phi-3's qkv_proj.

Read, an adapter of the joined module becomes one of each part, with the same A and the part's rows of B. Written, those
of the parts become one, whose A holds all of theirs and whose B has a block for each: its rank is the sum of theirs, or
their own where all have one A. Both compute the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax.numpy as jnp

# Last name of a joined module -> those of its parts, in the order of its output features.
Joined: TypeAlias = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class PeftModule:
    """One module's adapter: A (n, r), B (r, m), DoRA's magnitudes (m,) or None, rank and alpha."""

    name: str
    a: Any
    b: Any
    magnitude: Any
    rank: int
    alpha: float


def joined_name(name: str, joined: Joined) -> str:
    """Returns the module that this one is a part of; its own name if it is none."""
    start, dot, last = name.rpartition(".")
    whole = next((whole for whole, parts in joined.items() if last in parts), last)
    return f"{start}{dot}{whole}"


def split_tensors(tensors: Mapping[str, Any], joined: Joined, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the tensors of a PEFT file with those of a joined module cut into its parts'.

    Args:
      tensors: by name, without prefix.
      joined: what is joined there.
      sizes: name of a part -> its output features.

    Raises:
      ValueError: a joined module with another number of output features than its parts.
    """
    found: dict[str, Any] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".lora_")
        start, dot, last = module.rpartition(".")
        if last not in joined:
            found[key] = tensor
            continue
        parts = [f"{start}{dot}{part}" for part in joined[last]]
        lacking = [part for part in parts if part not in sizes]
        rows = [0 if lacking else sizes[part] for part in parts]
        if leaf != "A.weight" and (lacking or tensor.shape[0] != sum(rows)):
            raise ValueError(
                f"The tensor {key} has {tensor.shape[0]} output features, the model's {', '.join(joined[last])} "
                f"together {sum(rows)}. Load the adapter onto the model it was trained on."
            )
        for number, part in enumerate(parts):
            start_row = sum(rows[:number])
            value = tensor if leaf == "A.weight" else tensor[start_row : start_row + rows[number]]
            found[f"{part}.lora_{leaf}"] = value
    return found


def join_modules(
    modules: Sequence[PeftModule], joined: Joined, sizes: Mapping[str, int], use_rslora: bool
) -> list[PeftModule]:
    """Returns the modules, the parts of a joined one as that one; a part without an adapter adds zero.

    Raises:
      ValueError: DoRA of some parts of a joined module alone: the others' magnitudes are not known here.
    """
    groups: dict[str, dict[str, PeftModule]] = {}
    for module in modules:
        groups.setdefault(joined_name(module.name, joined), {})[module.name.rpartition(".")[2]] = module
    return [_joined(name, parts, joined, sizes, use_rslora) for name, parts in groups.items()]


def _joined(
    name: str, present: dict[str, PeftModule], joined: Joined, sizes: Mapping[str, int], use_rslora: bool
) -> PeftModule:
    start, dot, last = name.rpartition(".")
    if last not in joined:
        (module,) = present.values()
        return module
    found = [present[part] for part in joined[last] if part in present]
    rows = [sizes[f"{start}{dot}{part}"] for part in joined[last]]
    first, magnitude = found[0], None
    if first.magnitude is not None:
        if len(found) < len(rows):
            raise ValueError(
                f"{name} is one module in transformers, and DoRA was trained in {', '.join(present)} alone, which PEFT "
                "cannot hold. Adapt all of its parts, or export the merged model."
            )
        magnitude = jnp.concatenate([module.magnitude for module in found])

    def scale(module: PeftModule) -> float:
        return module.alpha / (math.sqrt(module.rank) if use_rslora else module.rank)

    shared = all(module.rank == first.rank and jnp.array_equal(module.a, first.a) for module in found)
    rank = first.rank if shared else sum(module.rank for module in found)
    a = first.a if shared else jnp.concatenate([module.a for module in found], axis=1)
    b, used = jnp.zeros((rank, sum(rows)), first.b.dtype), 0
    for number, part in enumerate(joined[last]):
        if (module := present.get(part)) is not None:
            begin = sum(rows[:number])
            block = (scale(module) / scale(first)) * module.b if scale(module) != scale(first) else module.b
            b = b.at[used : used + module.rank, begin : begin + rows[number]].set(block)
            used += 0 if shared else module.rank
    alpha = scale(first) * (math.sqrt(rank) if use_rslora else rank)
    return replace(first, name=name, a=a, b=b, magnitude=magnitude, rank=rank, alpha=alpha)
