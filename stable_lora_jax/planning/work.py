"""What one chip does and holds in one step: from the compiled program, or estimated where there is no compiler.

XLA counts a loop's body once, whatever its trip count. So FLOPs and bytes are those of the step with one layer, and for
every further layer the difference between one and two layers written out. Memory and collectives are those of the whole
program. A described GPU has no such count: there all of it is read in the whole program's text.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, Mesh

from stable_lora_jax.models.chunked_head import CHUNK_BYTES
from stable_lora_jax.planning.program import Collective, read_collectives
from stable_lora_jax.planning.program_work import attention_flops, bytes_moved, product_flops
from stable_lora_jax.planning.workload import StepShapes, Workload, lower, step_shapes
from stable_lora_jax.training.sharding import AXES, AnyMesh, frozen_shardings
from stable_lora_jax.training.step import suits_unrolling, train_step


@dataclass(frozen=True, kw_only=True)
class Work:
    """One chip's share of one step; sizes in bytes.

    Attributes:
      flops: floating point operations.
      bytes_accessed: moved between memory and chip.
      collectives: exchanged between chips.
      arguments: state, frozen weights and batch, as they lie between steps.
      temporaries: the most that a step holds besides.
      outputs: the next state and the metrics.
      aliased: of the outputs, what takes the place of arguments.
    """

    flops: float
    bytes_accessed: float
    collectives: tuple[Collective, ...]
    arguments: int
    temporaries: int
    outputs: int
    aliased: int

    @property
    def memory(self) -> int:
        """All that a chip holds at most."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def compiled_work(workload: Workload, mesh: Mesh) -> Work:
    """Returns the work of the compiled step.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses, e.g. because the step does not fit.
    """
    compiled = lower(workload, mesh).compile()
    memory: Any = compiled.memory_analysis()
    part, further = workload.part(), workload.config.num_layers - 1
    looped = _cost(lower(part.shallow(1), mesh))  # written out, the last layer does less
    one, two = (_cost(lower(part.shallow(layers), mesh, unroll=True)) for layers in (1, 2))
    costs = zip(looped, one, two, strict=True)
    flops, moved = (workload.accumulate * (first + further * (b - a)) for first, a, b in costs)
    return Work(
        flops=flops + kernel_flops(workload) / mesh.size,
        bytes_accessed=moved,
        collectives=tuple(read_collectives(compiled.as_text() or "", mesh.size)),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )


def kernel_flops(workload: Workload) -> int:
    """Returns the FLOPs of attention that a kernel does, which XLA does not see: those of attention written out."""
    written_out, with_kernel = (
        dot_flops(_trace(each, step_shapes(each))) for each in (replace(workload, attention="xla"), workload)
    )
    return written_out - with_kernel


def compiled_gpu_work(workload: Workload, mesh: Mesh) -> Work:
    """Returns the work of the step compiled for GPUs, which may be only described.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses.
    """
    return read_gpu_work(lower(workload, mesh, unroll=suits_unrolling(mesh)).compile(), mesh.size)


def read_gpu_work(compiled: jax.stages.Compiled, gpus: int) -> Work:
    """Returns the work of a program compiled for so many GPUs.

    FLOPs are those of products and of cuDNN's attention; element by element, there is little beside them.
    """
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    return Work(
        flops=product_flops(text) + attention_flops(text),
        bytes_accessed=bytes_moved(text),
        collectives=tuple(read_collectives(text, gpus)),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )


def _cost(lowered: jax.stages.Lowered) -> tuple[float, float]:
    cost: Any = lowered.compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def estimated_work(workload: Workload, mesh: AnyMesh) -> Work:
    """Returns what the step should cost, from its trace and the shardings alone.

    FLOPs of the matrix products and the size of what the forward pass keeps are counted in the traced step. The rest
    is a rule of thumb: weights are gathered over fsdp and read once in each pass, activations are written and read
    once, and two layers' gathered weights and three copies of a chunk of logits are held besides.
    """
    workload = replace(workload, attention="xla")  # the fused one's work is not seen in a trace, and is the same
    shapes = step_shapes(workload)
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    jaxpr = _trace(workload, shapes)
    parts, passes = workload.accumulate, 3 if workload.remat else 2
    state = _bytes(shapes.state)
    frozen = _split_bytes(shapes.frozen.params, mesh)
    layers = _bytes(shapes.frozen.params["layers"]) // tensor
    gathered = _bytes(shapes.frozen.params) // tensor  # what a chip reads, a layer at a time
    kept = _kept_bytes(jaxpr) // (data * fsdp)
    rows = workload.rows // (parts * data * fsdp)
    logits = 4 * rows * workload.num_targets * workload.config.vocab_size // tensor
    held_logits = min(logits, CHUNK_BYTES)
    whole_layers = 2 * layers // workload.config.num_layers + (gathered - layers) if fsdp > 1 else 0
    return Work(
        flops=dot_flops(jaxpr) / mesh.size,
        bytes_accessed=float(parts * (passes * gathered + 2 * kept + 4 * logits) + 4 * state),
        collectives=tuple(_expected_collectives(workload, shapes, mesh, passes)),
        arguments=state + frozen + _bytes(shapes.batch) // (data * fsdp),
        temporaries=kept + 3 * held_logits + whole_layers,
        outputs=state,
        aliased=state,
    )


def _expected_collectives(workload: Workload, shapes: StepShapes, mesh: AnyMesh, passes: int) -> Iterator[Collective]:
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    layers, parts = workload.config.num_layers, workload.accumulate
    if fsdp > 1:
        weights = _bytes(shapes.frozen.params["layers"]) // (tensor * layers)
        yield Collective("all-gather", tuple(range(fsdp)), passes * layers * parts, weights, True)
    if tensor > 1:
        # After attention and after the feed-forward part, in every pass.
        tokens = workload.tokens // (parts * data * fsdp)
        activations = tokens * workload.config.hidden_size * jnp.dtype(workload.dtype).itemsize
        yield Collective("all-reduce", tuple(range(tensor)), 2 * passes * layers * parts, activations, True)
    if data * fsdp > 1:
        yield Collective("all-reduce", tuple(range(data * fsdp)), 1, _bytes(shapes.state.adapters), False)


def _trace(workload: Workload, shapes: StepShapes) -> Any:
    graph, loss, optimizer, *arguments = shapes

    def step(*arguments: Any) -> Any:
        return train_step(graph, loss, optimizer, workload.accumulate, *arguments)

    jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]  # no gradients that nobody reads, of frozen weights


def dot_flops(jaxpr: Any) -> int:
    """Returns the FLOPs of all matrix products in a program but those of kernels; loops are counted in full."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":  # whose body is one block's, done as often as its grid and mask say
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(dot_flops(inner) for inner in _inner(eqn))
    return total


def _kept_bytes(jaxpr: Any) -> int:
    """Returns the bytes of the largest stack that a loop over layers leaves behind, for the backward pass to read."""
    kept = 0
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        kept = max(kept, *map(_kept_bytes, inner)) if inner else kept
        if eqn.primitive.name == "scan":
            # A stacked result has one axis more outside the loop than inside.
            results = zip(eqn.outvars, inner[0].outvars, strict=True)
            stacked = [var.aval for var, one in results if var.aval.ndim > one.aval.ndim]
            kept = max(kept, sum(aval.size * aval.dtype.itemsize for aval in stacked))
    return kept


def _inner(eqn: Any) -> list[Any]:
    """Returns the programs inside an equation: bodies of loops, branches, called functions."""
    nodes = jax.tree.leaves(eqn.params, is_leaf=lambda node: hasattr(node, "eqns"))
    return [getattr(node, "jaxpr", node) for node in nodes if hasattr(node, "eqns")]


def _split_bytes(params: Any, mesh: AnyMesh) -> int:
    shardings = frozen_shardings(mesh, params)
    parts = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), params, shardings)
    return sum(jax.tree.leaves(jax.tree.map(lambda leaf, size: size * leaf.dtype.itemsize, params, parts)))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """Returns a mesh of sizes alone."""
    return AbstractMesh((data, fsdp, tensor), AXES)
