"""Log-likelihoods of targets by an output layer, a chunk of targets at a time: only one chunk's logits are in memory.

Each log p depends on the hidden state it is read from alone, so its gradient is known as soon as its logits are:

    log p = z_y - lse(z),  z = h Wᵀ        ∂ log p / ∂h = (1_y - softmax(z)) W

The forward pass of a derivative computes both and forgets the logits; the backward pass multiplies by the cotangents.
So no logits are kept or computed again: two products with W in all, as without chunks (Liger kernels do the same for
the mean loss; arXiv 2410.10989). W itself is differentiated only where it is trained, by computing its chunks again.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stable_lora_jax.models.float32_dot import float32_dot

CHUNK_BYTES = 2**28  # of a chunk's logits, on one device
_TILE = 128  # rows that matrix units take at once: a product of 520 costs a GPU what one of 640 does

Hidden = Float[Array, "rows targets width"]
Targets = Int[Array, "rows targets"]
Weight = Float[Array, "first second"]


def chunked_log_likelihoods(
    hidden: Hidden, targets: Targets, weight: Weight, vocab_axis: int, row_splits: int = 1
) -> Float[Array, "rows targets"]:
    """Returns log p of each target, float32 nats.

    Args:
      hidden: normalised hidden states that the targets are predicted from.
      targets: ids in [0, vocabulary).
      weight: of the output layer.
      vocab_axis: which of its axes counts the vocabulary.
      row_splits: devices that the rows are split over.
    """
    rows, count, width = hidden.shape
    chunk = chunk_size(count, -(-rows // row_splits), weight.shape[vocab_axis])
    if chunk == count:
        return _log_p(vocab_axis, hidden, targets, weight)
    chunks = -(-count // chunk)
    padded = ((0, 0), (0, chunks * chunk - count))
    split_hidden = jnp.pad(hidden, (*padded, (0, 0))).reshape(rows, chunks, chunk, width).swapaxes(0, 1)
    split_targets = jnp.pad(targets, padded).reshape(rows, chunks, chunk).swapaxes(0, 1)
    log_p = jax.lax.map(lambda of: _log_p(vocab_axis, *of, weight), (split_hidden, split_targets))
    return log_p.swapaxes(0, 1).reshape(rows, -1)[:, :count]


def chunk_size(count: int, rows: int, vocabulary: int) -> int:
    """Returns how many targets of each row make a chunk: as few chunks as memory allows, of whole tiles, alike in size.

    Args:
      count: targets per row, all of them.
      rows: on one device.
      vocabulary: logits per target.
    """
    most = max(1, CHUNK_BYTES // (4 * rows * vocabulary))
    if most >= count:
        return count
    whole = _TILE // math.gcd(_TILE, rows)  # targets whose rows fill tiles
    if most < whole:
        whole = 1
    most -= most % whole
    alike = -(-count // -(-count // most))
    return -(-alike // whole) * whole


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_p(vocab_axis: int, hidden: Hidden, targets: Targets, weight: Weight) -> Float[Array, "rows targets"]:
    return _with_normaliser(vocab_axis, hidden, targets, weight)[0]


def _with_normaliser(vocab_axis: int, hidden: Hidden, targets: Targets, weight: Weight) -> tuple[Array, Array, Array]:
    """Returns log p, the logits and log Σ exp of these."""
    logits = float32_dot(hidden, weight, (((2,), (1 - vocab_axis,)), ((), ())))
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - normaliser, logits, normaliser


def _forward(vocab_axis: int, hidden: Any, targets: Any, weight: Any) -> tuple[Array, Any]:
    log_p, logits, normaliser = _with_normaliser(vocab_axis, hidden.value, targets.value, weight.value)
    vocabulary = jnp.arange(logits.shape[-1])
    # 1_y - softmax(z), rounded to the hidden states' dtype as the cotangent of the logits is elsewhere
    off = (vocabulary == targets.value[..., None]) - jnp.exp(logits - normaliser[..., None])
    off = off.astype(weight.value.dtype)
    gradient = jax.lax.dot_general(off, weight.value, (((2,), (vocab_axis,)), ((), ()))).astype(hidden.value.dtype)
    again = (hidden.value, targets.value, weight.value) if weight.perturbed else None
    return log_p, (gradient, again)


def _backward(vocab_axis: int, residuals: Any, cotangent: Any) -> tuple[Any, None, Any]:
    gradient, again = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, jnp.float32)
    d_hidden = (cotangent[..., None] * gradient).astype(gradient.dtype)
    if again is None:
        return d_hidden, None, None
    hidden, targets, weight = again
    _, transpose = jax.vjp(lambda weight: _with_normaliser(vocab_axis, hidden, targets, weight)[0], weight)
    return d_hidden, None, *transpose(cotangent)


_log_p.defvjp(_forward, _backward, symbolic_zeros=True)
