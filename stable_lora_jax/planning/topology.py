"""TPU slices and hosts of GPUs: what a chip can do by its published figures, and which links join the chips.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of Google Cloud's TPU documentation. They give the
links' rate for all ports of a chip and both directions together; one link in one direction carries it over 2 x ports.
The page of v4 gives none: its six links of 50 GB/s are in arXiv 2304.01433, table 4. GPUs: NVIDIA's data sheets of the
SXM cards, dense rates; NVLink joins the cards of a host by a switch, and its rate is given for both directions.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      hbm: bytes of memory. Compilers keep some of it for themselves.
      flops: bfloat16 operations a second; float32 products at default precision run as bfloat16 too.
      hbm_rate: bytes per second between memory and chip.
      link_rate: bytes per second of one link to a neighbour, in one direction.
      axes: of the torus that slices are cut from; 1 for the GPUs of a host.
      ring_multiple: an axis of a slice is closed to a ring if its size is a multiple of this; 0: it never is.
      is_gpu: whether it is one.
    """

    hbm: int
    flops: float
    hbm_rate: float
    link_rate: float
    axes: int
    ring_multiple: int
    is_gpu: bool = False


CHIPS = {
    # 32 GiB at 1200 GB/s; 275 TFLOPs; 6 links of 50 GB/s
    "v4": Chip(hbm=32 << 30, flops=275e12, hbm_rate=1200e9, link_rate=50e9, axes=3, ring_multiple=4),
    # 16 GB at 819 GB/s; 197 TFLOPs; 400 GB/s over 4 ports, both directions
    "v5e": Chip(hbm=16 << 30, flops=197e12, hbm_rate=819e9, link_rate=50e9, axes=2, ring_multiple=16),
    # 95 GiB at 2765 GB/s; 459 TFLOPs; 1200 GB/s over 6 ports, both directions
    "v5p": Chip(hbm=95 << 30, flops=459e12, hbm_rate=2765e9, link_rate=100e9, axes=3, ring_multiple=4),
    # 32 GB at 1638 GB/s; 918 TFLOPs; 800 GB/s over 4 ports, both directions
    "v6e": Chip(hbm=32 << 30, flops=918e12, hbm_rate=1638e9, link_rate=100e9, axes=2, ring_multiple=16),
    # 80 GB at 3.35 TB/s; 989 TFLOPs; NVLink 900 GB/s, both directions
    "h100": Chip(hbm=80 * 10**9, flops=989e12, hbm_rate=3350e9, link_rate=450e9, axes=1, ring_multiple=0, is_gpu=True),
    # 141 GB at 4.8 TB/s
    "h200": Chip(hbm=141 * 10**9, flops=989e12, hbm_rate=4800e9, link_rate=450e9, axes=1, ring_multiple=0, is_gpu=True),
    # 80 GB at 2.04 TB/s; 312 TFLOPs; NVLink 600 GB/s, both directions
    "a100": Chip(hbm=80 * 10**9, flops=312e12, hbm_rate=2039e9, link_rate=300e9, axes=1, ring_multiple=0, is_gpu=True),
}
_HOST = 8  # GPUs of a host


@dataclass(frozen=True)
class Topology:
    """A TPU slice or a host of GPUs: the chips' generation, and how many stand along each axis."""

    generation: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.sizes))}"

    @property
    def chip(self) -> Chip:
        """Figures of one chip."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.sizes)

    def group_rate(self, axes: Sequence[int]) -> float:
        """Returns the bytes per second that every chip of a group can receive when the group spans these axes.

        A chip at the end of an axis has one neighbour along it, and two where the axis is closed to a ring; the
        slowest chip sets the pace.
        """
        ring = self.chip.ring_multiple
        links = sum(2 if ring and self.sizes[axis] % ring == 0 else 1 for axis in axes)
        return max(links, 1) * self.chip.link_rate

    def axes_for(self, members: int) -> tuple[int, ...]:
        """Returns the axes that a group of so many neighbours spans at least."""
        largest = max(range(len(self.sizes)), key=lambda axis: self.sizes[axis])
        return (largest,) if members <= self.sizes[largest] else tuple(a for a, n in enumerate(self.sizes) if n > 1)


def parse_topology(text: str) -> Topology:
    """Returns the slice named like "v5e:4x4" or "v5p:2x2x4", or the GPUs named like "h100:8".

    Raises:
      ValueError: an unknown chip, a shape that its slices cannot have, or more GPUs than a host has.

    Examples:
      >>> parse_topology("v5p:2x2x4").chips
      16
    """
    generation, _, shape = text.partition(":")
    if generation not in CHIPS:
        raise ValueError(
            f"topology={text!r}: {generation!r} is no known chip. Known are {', '.join(CHIPS)}; write e.g. v5e:4x4, "
            "v5p:2x2x4 or h100:1."
        )
    axes = CHIPS[generation].axes
    if CHIPS[generation].is_gpu and (not re.fullmatch(r"[1-9]\d*", shape) or int(shape) > _HOST):
        raise ValueError(
            f"topology={text!r} is not understood at {shape!r}. Plans for GPUs are of one host: write e.g. "
            f"{generation}:1 to {generation}:{_HOST}."
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        raise ValueError(
            f"topology={text!r} is not understood at {shape!r}. A slice of {generation} has {axes} axes; write e.g. "
            f"{generation}:{'x'.join('4' * axes)}."
        )
    return Topology(generation, tuple(map(int, shape.split("x"))))
