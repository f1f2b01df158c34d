"""Many adapters trained at once over one frozen base: a whole search, or several seeds, in one program.

The single training step is mapped (`jax.vmap`) over adapters, optimizer states, batches and the numbers that vary: the
learning rate, λ, the ratio of LoRA+, the weight decay and the scale s; where A starts is a matter of the adapters that
are given. The base weights are not mapped, so they are stored, and read at every product, once for all. Nothing is
shared between the adapters beyond that: one that becomes infinite leaves the others as they are.

The scale is a static number of the model. Here it rides on B: ``s (x A) B = s₀ (x A) (s/s₀ B)`` in the forward pass,
where s₀ is the model's own, while the B that is trained, and that the optimizer sees, is the plain one.

Not here: dropout (its masks belong to the model, not to an adapter), checkpoints, gradient accumulation, and cuDNN's
attention: JAX maps it over adapters only where there is no mask, or one per head; attention is written out instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from stable_lora_jax.data import Batch, TrainBatches, pad_batch
from stable_lora_jax.lora import lora_modules
from stable_lora_jax.models import Decoder
from stable_lora_jax.optim.hyperparameters import Number
from stable_lora_jax.training.loop import check_intervals
from stable_lora_jax.training.loss import Loss
from stable_lora_jax.training.sharding import AXES, make_mesh
from stable_lora_jax.training.step import Frozen, StepMetrics, TrainState, init_state, place, train_step


class SweepPoint(NamedTuple):
    """The numbers in which one adapter may differ from another; η is the peak where there is a schedule."""

    learning_rate: Number
    scale: Number
    lam: Number = 0.0
    ratio: Number = 1.0
    weight_decay: Number = 0.0


MakeOptimizer: TypeAlias = Callable[[SweepPoint], optax.GradientTransformation]
SweepStep: TypeAlias = Callable[[TrainState, SweepPoint, Frozen, Batch], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What became of K adapters.

    Attributes:
      adapters: the trained matrices of each, as `split_model` gives them.
      losses: of every step.
      failed_at: the first step whose loss, gradient or update was not finite, 0 if there was none.
      stable_at: pair -> the step at which each matrix became stable, 0 if it did not; empty without Stable-LoRA.
    """

    adapters: tuple[Any, ...]
    losses: Float[np.ndarray, "steps K"]
    failed_at: Int[np.ndarray, " K"]
    stable_at: dict[str, Int[np.ndarray, "K *stack"]]


def train_sweep(
    graph: nnx.GraphDef,
    frozen: Frozen,
    starts: Sequence[Any],
    batches: Sequence[TrainBatches],
    points: Sequence[SweepPoint],
    make_optimizer: MakeOptimizer,
    *,
    loss: Loss,
    total_steps: int,
    mesh: Mesh | None = None,
    watch: Callable[[int, Any], None] | None = None,
    every: int = 1,
    progress: bool = True,
) -> SweepResult:
    """Returns K adapters, each as its single run would train it.

    Args:
      graph, frozen: the model's structure and base weights, from `split_model`.
      starts: the adapters to start from, one per point.
      batches: the batches of every point; their sizes are the same.
      points: the numbers of each.
      make_optimizer: from a point, whose numbers are traced arrays, to its transformation.
      loss: from `make_loss`.
      total_steps: number of steps.
      mesh: devices that share the adapters among them, K a multiple of their number; one device if None.
      watch: is given the step, counted from 1, and the adapters, whose leaves have a leading axis over all; they live
        until the next step.
      every: steps between two calls of it; there is one after the last step too.
      progress: show a progress bar.

    Raises:
      ValueError: not one start and one sequence of batches for every point, dropout, a mesh that does not divide K, or
        `every` below 1.
    """
    check_intervals(every=every)
    mesh = mesh or make_mesh()
    _check(frozen, starts, batches, points, mesh)
    shared = _shared(mesh)
    frozen = jax.device_put(frozen, place(mesh, frozen))
    columns = (jnp.asarray(column, jnp.float32) for column in zip(*points, strict=True))
    numbers = jax.device_put(SweepPoint(*columns), shared)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    state = jax.device_put(jax.vmap(lambda one: init_state(one, make_optimizer(points[0])))(stacked), shared)

    step = compile_sweep_step(graph, loss, make_optimizer, mesh=mesh)
    history = []
    for index in tqdm(range(total_steps), desc=f"sweep of {len(points)}", unit="step", disable=not progress):
        batch = jax.device_put(_stack([each[index] for each in batches]), shared)
        state, metrics = step(state, numbers, frozen, batch)
        history.append(metrics)
        if watch and ((index + 1) % every == 0 or index + 1 == total_steps):
            watch(index + 1, state.adapters)
    history = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(history))
    finite = np.isfinite([history.loss, history.grad_norm, history.update_norm]).all(0)
    adapters = tuple(jax.tree.map(lambda x, k=k: x[k], jax.device_get(state.adapters)) for k in range(len(points)))
    return SweepResult(
        adapters=adapters,
        losses=history.loss,
        failed_at=_first(~finite),
        stable_at={name: _first(flags) for name, flags in history.stable.items()},
    )


def compile_sweep_step(graph: nnx.GraphDef, loss: Loss, make_optimizer: MakeOptimizer, *, mesh: Mesh) -> SweepStep:
    """Returns the jitted step of all adapters: ``(states, numbers, frozen, batches) -> (states, metrics)``.

    Everything but the frozen part has a leading axis over the adapters, which the mesh's devices share among them;
    states are donated. It compiles once per batch shape.

    Args:
      graph, loss, make_optimizer, mesh: as in `train_sweep`.
    """

    def step(state: TrainState, numbers: SweepPoint, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        at_scale = _at_scale(loss, numbers.scale)
        return train_step(graph, at_scale, make_optimizer(numbers), 1, state, frozen, batch)

    mapped = jax.vmap(step, in_axes=(0, 0, None, 0))
    return jax.jit(mapped, donate_argnums=0, out_shardings=_shared(mesh))


def _shared(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what has an axis over the adapters: that axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def _at_scale(loss: Loss, scale: Number) -> Loss:
    """Returns the loss of the model whose adapters have another scale, with an attention that can be mapped."""

    def scaled(model: Decoder, batch: Batch) -> tuple[Array, Array]:
        model.attention = "xla" if model.attention == "cudnn" else model.attention
        for module in lora_modules(model).values():
            module.lora_b[...] = jnp.asarray(scale / module.scale, module.lora_b.dtype) * module.lora_b[...]
        return loss(model, batch)

    return scaled


def _stack(batches: Sequence[Batch]) -> Batch:
    """Returns the batches, padded to one shape, along a new leading axis."""
    sizes = [max(getattr(b, name).shape[1] for b in batches) for name in ("tokens", "targets", "answer")]
    return Batch(*map(np.stack, zip(*(pad_batch(b, *sizes) for b in batches), strict=True)))


def _first(flags: Bool[np.ndarray, "steps *shape"]) -> Int[np.ndarray, "*shape"]:
    """Returns the first step, counted from 1, at which a flag is up; 0 where it never is."""
    return np.where(flags.any(0), flags.argmax(0) + 1, 0)


def _check(
    frozen: Frozen, starts: Sequence[Any], batches: Sequence[TrainBatches], points: Sequence[SweepPoint], mesh: Mesh
) -> None:
    if not len(starts) == len(batches) == len(points) >= 1:
        raise ValueError(
            f"A sweep got {len(points)} points, {len(starts)} starts and {len(batches)} sequences of batches. Give one "
            "start and one sequence of batches for every point, and at least one point."
        )
    if jax.tree.leaves(frozen.random):
        raise ValueError("A sweep cannot train with dropout, whose masks the adapters would share. Inject without it.")
    if len(points) % mesh.size:
        raise ValueError(
            f"{len(points)} adapters cannot be shared evenly by {mesh.size} devices. Choose a multiple, or a smaller "
            "mesh."
        )
