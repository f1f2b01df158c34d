"""What is minimised: the answer's tokens, or the choice among the answers."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stable_lora_jax.data import Batch
from stable_lora_jax.evaluation import branch_log_likelihoods, target_log_likelihoods
from stable_lora_jax.models import Decoder

LOSSES = ("answer", "choices")

# (model, batch) -> (sum of losses, number of terms), so that parts of a batch can be added up before dividing.
Loss: TypeAlias = Callable[[Decoder, Batch], tuple[Float[Array, ""], Float[Array, ""]]]


def make_loss(name: str, num_branches: int) -> Loss:
    """Returns a loss by name.

    ``answer``: -log p of each token of the right answer; rows must hold that answer only (`right_branch_only`).
    ``choices``: -log of the right choice's share in a softmax over the choices' log p per token.

    Args:
      name: one of `LOSSES`.
      num_branches: the most choices of any example (choices only).

    Raises:
      ValueError: an unknown name.
    """
    if name not in LOSSES:
        raise ValueError(f"loss={name!r} is unknown. Known losses: {', '.join(LOSSES)}.")
    if name == "answer":
        return _answer_loss
    return lambda model, batch: _choices_loss(model, batch, num_branches)


def _answer_loss(model: Decoder, batch: Batch) -> tuple[Array, Array]:
    log_p = target_log_likelihoods(model, batch, one_branch=True)
    return -log_p.sum(), jnp.asarray(batch.branch >= 0).sum().astype(jnp.float32)


def _choices_loss(model: Decoder, batch: Batch, num_branches: int) -> tuple[Array, Array]:
    sums, counts = branch_log_likelihoods(target_log_likelihoods(model, batch), batch, num_branches)
    scores = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), -jnp.inf)
    real = jnp.asarray(batch.answer >= 0)
    scores = jnp.where(real[..., None], scores, 0.0)  # where there is no question: keep its softmax finite
    log_share = jax.nn.log_softmax(scores, axis=-1)
    chosen = jnp.take_along_axis(log_share, jnp.maximum(batch.answer, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(real, chosen, 0.0).sum(), real.sum().astype(jnp.float32)
