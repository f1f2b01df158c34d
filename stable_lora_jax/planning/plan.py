"""A plan: does a training step fit a TPU slice or GPUs, how long does it take, what binds, what does a run cost.

With libtpu or the CUDA plugin installed the step is compiled for the devices, on any machine, and the figures are those
of the compiled program. Without, they are estimated. The plan says which. Either way no chip is asked: seconds are what
the chips' published rates allow, from "everything overlaps" (the slowest of compute, memory and links alone) to
"nothing does" (their sum). Real steps are seldom faster than the first.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stable_lora_jax.models import choose_attention
from stable_lora_jax.planning.described_gpus import described_gpus, has_gpu_compiler
from stable_lora_jax.planning.program import Collective
from stable_lora_jax.planning.topology import Topology
from stable_lora_jax.planning.work import Work, abstract_mesh, compiled_gpu_work, compiled_work, estimated_work
from stable_lora_jax.planning.workload import Workload, step_shapes
from stable_lora_jax.training import join_model
from stable_lora_jax.training.sharding import AXES, check_decoder, check_rows, make_mesh


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """All collectives of one kind over groups of one size and span.

    Attributes:
      kind: e.g. "all-gather".
      members: chips of a group.
      runs: in a step.
      bytes: that a chip receives in a step.
      seconds: at the published rate of the links that the group spans.
    """

    kind: str
    members: int
    runs: int
    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about one step on one slice; bytes, FLOPs and seconds are one chip's in one step.

    Attributes:
      source: "compiled", or "estimate" where there is no compiler or the step does not fit.
      versions: of jax and, if compiled, of the compiler.
      trainable, frozen: parameters of the adapters and of the base model.
      needs: bytes that the compiler says it needs, if it refused for want of memory.
      work: see `Work`.
      exchanges: the collectives, summed up.
    """

    workload: Workload
    topology: Topology
    mesh: Mapping[str, int]
    source: str
    versions: Mapping[str, str]
    trainable: int
    frozen: int
    needs: int | None
    work: Work
    exchanges: tuple[Exchange, ...]

    @property
    def memory(self) -> int:
        """Bytes that a chip must hold."""
        return self.needs or self.work.memory

    @property
    def fits(self) -> bool:
        """Whether the step fits the chip's memory."""
        return self.needs is None and self.memory <= self.topology.chip.hbm

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that compute, memory and links take, each alone."""
        chip = self.topology.chip
        return {
            "compute": self.work.flops / chip.flops,
            "memory": self.work.bytes_accessed / chip.hbm_rate,
            "links": sum(exchange.seconds for exchange in self.exchanges),
        }

    @property
    def binds(self) -> str:
        """Which of the three takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """The least seconds per step takes if all three overlap, and if none do."""
        return max(self.seconds.values()), sum(self.seconds.values())

    def run_cost(self, steps: int, price_per_chip_hour: float) -> tuple[float, float]:
        """Returns what a run costs, from the least to the most; in the price's currency."""
        least, most = (
            steps * seconds / 3600 * self.topology.chips * price_per_chip_hour for seconds in self.step_seconds
        )
        return least, most

    def advice(self) -> list[str]:
        """Returns what to change so that it fits, the cheapest change first; nothing if it fits."""
        if self.fits:
            return []
        work, load, chips = self.work, self.workload, self.topology.chips
        rows_a_chip = load.rows // (load.accumulate * self.mesh["data"] * self.mesh["fsdp"])
        changes = []
        if work.temporaries > self.topology.chip.hbm // 8:
            changes += [] if load.remat else ["--remat: recompute each layer instead of keeping what it computed"]
            if rows_a_chip % 2 == 0:
                changes.append(f"--accumulate {2 * load.accumulate}: process the batch in smaller parts")
            changes.append(f"--length {load.length // 2}, or fewer --targets-per-row: shorter rows")
        if np.dtype(load.dtype).itemsize > 2:
            changes.append("--dtype bfloat16: half the weights and activations")
        if self.mesh["fsdp"] * self.mesh["tensor"] < chips and load.rows % (chips * load.accumulate) == 0:
            changes.append(f"--mesh fsdp={chips}: split the weights over all chips")
        return [*changes, f"a larger slice or chip than {self.topology}"]

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        work, load = self.work, self.workload
        least, most = self.step_seconds
        return {
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "mesh": dict(self.mesh),
            "step": {
                "rows": load.rows,
                "length": load.length,
                "targets_per_row": load.num_targets,
                "method": load.method,
                "rank": load.rank,
                "targets": load.targets,
                "dtype": np.dtype(load.dtype).name,
                "remat": load.remat,
                "accumulate": load.accumulate,
            },
            "source": self.source,
            "versions": dict(self.versions),
            "parameters": {"trainable": self.trainable, "frozen": self.frozen},
            "memory_per_chip": {
                "arguments": work.arguments,
                "temporaries": work.temporaries,
                "outputs": work.outputs,
                "aliased": work.aliased,
                "total": self.memory,
                "available": self.topology.chip.hbm,
            },
            "fits": self.fits,
            "flops_per_chip": work.flops,
            "bytes_accessed_per_chip": work.bytes_accessed,
            "collectives": [vars(exchange) for exchange in self.exchanges],
            "seconds": self.seconds,
            "binds": self.binds,
            "step_seconds": {"least": least, "most": most},
            "tokens_per_second": {"least": load.tokens / most, "most": load.tokens / least},
            "advice": self.advice(),
        }


def plan_step(workload: Workload, topology: Topology, sizes: Mapping[str, int], *, use_compiler: bool) -> Plan:
    """Returns the plan of a step on a slice.

    Args:
      workload: the step.
      topology: the slice.
      sizes: of the mesh axes, of `training.sharding.AXES`; 1 if not given.
      use_compiler: compile for the devices, which needs libtpu or the CUDA plugin; otherwise estimate.

    Raises:
      ValueError: a mesh that has not as many devices as the slice has chips, or that divides the batch, the heads or a
        width badly; a slice that the compiler does not know.
    """
    full = {axis: sizes.get(axis, 1) for axis in AXES}
    mesh = abstract_mesh(**full)
    if mesh.size != topology.chips:
        raise ValueError(
            f"The mesh {_listed(full)} has {mesh.size} devices, and {topology} has {topology.chips} chips. Choose "
            f"sizes whose product is {topology.chips}."
        )
    check_rows(mesh, workload.rows, workload.accumulate)
    shapes = step_shapes(workload)
    check_decoder(mesh, join_model(shapes.graph, shapes.state.adapters, shapes.frozen))
    needs, versions, compiled = None, {"jax": jax.__version__}, None
    if use_compiler:
        devices = topology_devices(topology)
        compiler = "jaxlib" if topology.chip.is_gpu else "libtpu"
        versions[compiler] = version(compiler)
        compiled = make_mesh(**full, devices=devices)
        head_dim = workload.config.head_dim
        chosen = choose_attention("auto", dtype=workload.dtype, head_dim=head_dim, device=devices[0])
        workload = replace(workload, attention=chosen)
    try:
        if compiled is None:
            work = estimated_work(workload, mesh)
        elif topology.chip.is_gpu:
            work = compiled_gpu_work(workload, compiled)
        else:
            work = compiled_work(workload, compiled)
    except jax.errors.JaxRuntimeError as error:
        if (needs := _needed_bytes(str(error))) is None:
            raise
        work, compiled = estimated_work(workload, mesh), None
    return Plan(
        workload=workload,
        topology=topology,
        mesh=full,
        source="compiled" if compiled else "estimate",
        versions=versions,
        trainable=_count(shapes.state.adapters),
        frozen=_count(shapes.frozen.params),
        needs=needs,
        work=work,
        exchanges=_exchanges(work.collectives, topology, compiled),
    )


def has_compiler(topology: Topology) -> bool:
    """Returns whether what compiles for these devices is installed: libtpu, or the CUDA plugin."""
    return has_gpu_compiler() if topology.chip.is_gpu else find_spec("libtpu") is not None


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Returns devices that stand for chips nobody has: programs compile for them and do not run.

    Raises:
      ValueError: the compiler is missing, or does not know the slice.
    """
    if topology.chip.is_gpu:
        return described_gpus(topology.generation, topology.chips)
    if not has_compiler(topology):
        raise ValueError("libtpu is not installed, so nothing compiles for TPUs. Install stable-lora-jax[tpu].")
    from jax.experimental import topologies

    # There is no TPU machine to ask about itself, and no chip that another process could hold.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=str(topology)).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu gives no slice {topology}: {str(error).splitlines()[0]} Choose a shape that is offered, such as "
            "v5e:4x4, v5e:16x16, v5p:2x2x2 or v6e:4x4."
        ) from None


def _exchanges(collectives: Sequence[Collective], topology: Topology, mesh: Mesh | None) -> tuple[Exchange, ...]:
    sums: dict[tuple[str, int, tuple[int, ...]], list[Collective]] = defaultdict(list)
    for each in collectives:
        members = len(each.group)
        axes = topology.axes_for(members) if mesh is None else _spanned(each.group, mesh)
        sums[each.kind, members, axes].append(each)
    exchanges = []
    for (kind, members, axes), same in sums.items():
        received = sum(each.received_bytes for each in same)
        seconds = received / topology.group_rate(axes)
        runs = sum(each.runs for each in same)
        exchanges.append(Exchange(kind=kind, members=members, runs=runs, bytes=received, seconds=seconds))
    return tuple(sorted(exchanges, key=lambda exchange: -exchange.seconds))


def _spanned(group: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
    """Returns the axes of the slice along which the chips of a group differ."""
    coordinates = np.array([mesh.devices.flat[index].coords for index in group])  # of GPUs, all the same
    return tuple(np.flatnonzero(np.ptp(coordinates, axis=0)).tolist())


def _needed_bytes(message: str) -> int | None:
    """Returns the bytes that libtpu says a program needs when it refuses it for that; None for any other message."""
    found = re.search(r"Ran out of memory.*?\(?([\d.]+)([KMGT])\)?\s+(?:of|exceeds)", message, re.DOTALL)
    return int(float(found[1]) * 1024 ** (" KMGT".index(found[2]))) if found else None


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
