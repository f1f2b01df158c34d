"""The training step as shapes: the real one of `training.compile_step`, of a model that has no weights yet."""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from stable_lora_jax.data import Batch
from stable_lora_jax.lora import inject_lora
from stable_lora_jax.models import Decoder, DecoderConfig
from stable_lora_jax.models.attention import Attention
from stable_lora_jax.training import (
    Frozen,
    Loss,
    TrainState,
    compile_step,
    init_state,
    learning_rate_schedule,
    make_loss,
    make_optimizer,
    split_model,
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step to plan for.

    Attributes:
      config: of the model.
      rows: B, of the whole batch.
      length: T, tokens per row, at most the model's context.
      num_targets: P, predicted tokens per row; what is paid for logits.
      method: one of `training.METHODS`.
      rank: r of the adapters.
      targets: adapted modules, as in `inject_lora`.
      dtype: of the frozen weights and the computation; adapters are float32.
      remat: recompute each layer in the backward pass.
      accumulate: parts that the batch is processed in.
      attention: "xla", or the device's kernel (see `models.choose_attention`).

    Raises:
      ValueError: a number below 1, rows that the parts do not divide, or a row longer than the model's context.
    """

    config: DecoderConfig
    rows: int
    length: int
    num_targets: int
    method: str = "stable-lora"
    rank: int = 8
    targets: str = "qv"
    dtype: DTypeLike = jnp.bfloat16
    remat: bool = False
    accumulate: int = 1
    attention: Attention = "xla"

    def __post_init__(self):
        for name in ("rows", "length", "num_targets", "accumulate"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} is below 1. Give at least one.")
        if self.rows % self.accumulate:
            raise ValueError(
                f"A batch of {self.rows} rows does not split into accumulate={self.accumulate} equal parts. Choose "
                "accumulate among the divisors of the batch."
            )
        if self.length > self.config.max_positions:
            raise ValueError(
                f"length={self.length} is more than the model's context of {self.config.max_positions} tokens. Choose "
                "shorter rows."
            )

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length

    def part(self) -> "Workload":
        """Returns one of the parts that the batch is processed in, as a step of its own."""
        return replace(self, rows=self.rows // self.accumulate, accumulate=1)

    def shallow(self, layers: int) -> "Workload":
        """Returns the same with fewer layers."""
        return replace(self, config=replace(self.config, num_layers=layers))


class StepShapes(NamedTuple):
    """A step and the shapes of all that it is called with."""

    graph: nnx.GraphDef
    loss: Loss
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Frozen
    batch: Batch


def abstract_model(workload: Workload) -> Decoder:
    """Returns the adapted model with shapes for arrays."""
    config = workload.config

    def build() -> Decoder:
        model = Decoder(
            config,
            rngs=nnx.Rngs(0),
            dtype=workload.dtype,
            param_dtype=workload.dtype,
            remat=workload.remat,
            attention=workload.attention,
        )
        return inject_lora(model, workload.rank, 2.0 * workload.rank, workload.targets, rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


@functools.lru_cache(maxsize=2)
def step_shapes(workload: Workload) -> StepShapes:
    """Returns the step and its arguments in shapes. The rates in it are of no consequence: the program is the same."""
    graph, adapters, frozen = split_model(abstract_model(workload))
    schedule = learning_rate_schedule(5e-4, 1000, 30, "cosine")
    optimizer = make_optimizer(workload.method, schedule, lam=0.001, ratio=4.0, weight_decay=0.0, clip_norm=1.0)

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    row, targets = integers(workload.rows, workload.length), integers(workload.rows, workload.num_targets)
    batch = Batch(
        tokens=row,
        positions=row,
        segments=row,
        documents=row,
        read_at=targets,
        targets=targets,
        branch=targets,
        owner=targets,
        answer=integers(workload.rows, 1),
    )
    state = jax.eval_shape(lambda adapters: init_state(adapters, optimizer), adapters)
    return StepShapes(graph, make_loss("answer", 1), optimizer, state, frozen, batch)


def lower(workload: Workload, mesh: Mesh, *, unroll: bool = False) -> jax.stages.Lowered:
    """Returns the step's program for a mesh, ready to compile, also for devices that are only described.

    Args:
      workload: the step.
      mesh: of real or described devices.
      unroll: whether the model's layers are written out.
    """
    graph, loss, optimizer, state, frozen, batch = step_shapes(workload)
    options: dict[str, Any] = {"accumulate": workload.accumulate, "unroll": unroll}
    step: Any = compile_step(graph, loss, optimizer, mesh=mesh, frozen=frozen, **options)
    return step.lower(state, frozen, batch)
