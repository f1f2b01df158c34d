"""One training step: a pure function of (state, frozen weights, batch), and its compiled, sharded form.

The gradient is taken for the adapters only. Random numbers (dropout) are a function of the step, so that a resumed run
draws what an uninterrupted one would have drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from stable_lora_jax.data import Batch
from stable_lora_jax.models.decoder import AS_IT_IS, Placement
from stable_lora_jax.optim import StableLoraState
from stable_lora_jax.optim.pairs import find_states
from stable_lora_jax.training.loss import Loss
from stable_lora_jax.training.sharding import batch_sharding, frozen_shardings, placement_on, replicated


class TrainState(NamedTuple):
    """All that changes in training, and all that a checkpoint holds.

    Attributes:
      step: number of steps done.
      adapters: the LoRA matrices, a tree of arrays.
      opt_state: the optimizer's state, with Stable-LoRA's flags.
    """

    step: Int32[Array, ""]
    adapters: Any
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step reports.

    Attributes:
      loss: mean over what the loss counts, before the update.
      grad_norm: global norm of the gradients, before clipping.
      update_norm: global norm of what the adapters move by, the shrink included.
      stable: pair -> flags after the update; none for other methods.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    stable: dict[str, Bool[Array, "*stack"]]


Step: TypeAlias = Callable[[TrainState, "Frozen", Batch], tuple[TrainState, StepMetrics]]


class Frozen(NamedTuple):
    """What training reads and never changes: the base weights, and the keys that random streams start from."""

    params: nnx.State
    random: nnx.State


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, Frozen]:
    """Returns (graph, adapters as plain arrays, frozen) of a model with adapters."""
    graph, adapters, random, params = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)
    return graph, nnx.as_pure(adapters), Frozen(nnx.as_pure(params), nnx.as_pure(random))


def join_model(
    graph: nnx.GraphDef,
    adapters: nnx.State,
    frozen: Frozen,
    placement: Placement = AS_IT_IS,
    *,
    unroll: bool = False,
) -> Any:
    """Returns the model that `split_model` took apart; arrays are shared, not copied.

    Args:
      graph, adapters, frozen: its parts.
      placement: where arrays live while they are used.
      unroll: whether its layers are written out, also where the model's own are not; see `Decoder`.
    """
    model = nnx.merge(graph, adapters, frozen.random, frozen.params)
    model.placement, model.unroll = placement, unroll or model.unroll
    return model


def suits_unrolling(mesh: Mesh) -> bool:
    """Returns whether a step had better write its layers out: on GPUs of which each holds all weights.

    There a loop over layers copies each layer's weights out of the stack, and what is kept for the backward pass into
    others. Of weights that devices share, a loop gathers one layer at a time, which is not sure without it.
    """
    return mesh.devices.flat[0].platform in ("gpu", "cuda") and mesh.shape["fsdp"] == 1


def init_state(adapters: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), adapters, optimizer.init(adapters))


def train_step(
    graph: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    placement: Placement = AS_IT_IS,
    *,
    unroll: bool = False,
) -> tuple[TrainState, StepMetrics]:
    """Returns the next state and the metrics of the step.

    Args:
      graph: the model's structure, from `split_model`.
      loss: from `make_loss`.
      optimizer: updates the adapters.
      accumulate: number of parts that the batch's rows are processed in, one after the other, to save memory; the
        result is that of the whole batch, but for dropout, whose masks every part draws anew.
      state: where training stands; donate it.
      frozen: the base model.
      batch: B rows, B a multiple of `accumulate`.
      placement: where arrays live while they are used.
      unroll: whether the model's layers are written out.
    """

    def loss_sum(adapters: nnx.State, part: Batch, random: nnx.State) -> tuple[Array, Array]:
        return loss(join_model(graph, adapters, Frozen(frozen.params, random), placement, unroll=unroll), part)

    def add_part(sums: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
        index, part = numbered
        random = _keys_of(frozen.random, state.step, index)
        (total, count), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.adapters, part, random)
        return jax.tree.map(jnp.add, sums, (total, count, grads)), None

    zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.adapters))
    if accumulate == 1:
        sums, _ = add_part(zeros, (jnp.zeros((), jnp.int32), batch))
    else:
        # Every accumulate-th row, so that each part is spread over the devices as the batch is.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
        sums, _ = jax.lax.scan(add_part, zeros, (jnp.arange(accumulate), parts))
    total, count, grads = sums
    grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    stable = {name: flag for found in find_states(opt_state, StableLoraState) for name, flag in found.stable.items()}
    metrics = StepMetrics(total / count, optax.tree.norm(grads), optax.tree.norm(updates), stable)
    return TrainState(state.step + 1, adapters, opt_state), metrics


def compile_step(
    graph: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    frozen: Frozen,
    accumulate: int = 1,
    unroll: bool = False,
) -> Step:
    """Returns the jitted `train_step`: state donated, batch split over the mesh, frozen weights by the table of rules.

    It compiles once per batch shape, if state, weights and batches are already laid on the mesh (`jax.device_put` with
    `replicated(mesh)`, `place(mesh, frozen)` and `batch_sharding(mesh)`); else once more, for the first step.

    Raises:
      ValueError: the mesh does not divide a parameter.
    """

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(graph, loss, optimizer, accumulate, state, frozen, batch, placement_on(mesh), unroll=unroll)

    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(everywhere, place(mesh, frozen), batch_sharding(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def place(mesh: Mesh, frozen: Frozen) -> Frozen:
    """Returns the shardings of the frozen part."""
    return Frozen(frozen_shardings(mesh, frozen.params), jax.tree.map(lambda _: replicated(mesh), frozen.random))


def _keys_of(random: nnx.State, step: Array, part: Array) -> nnx.State:
    """Returns the random streams of one part of one step: every key folded with both numbers."""

    def fold(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), part))(leaf.reshape(-1))
        return keys.reshape(leaf.shape)

    return jax.tree.map(fold, random)
