"""Causal attention in blocks of queries, each with the keys up to its end: what no query may see is not computed.

softmax(q kᵀ / √d) v for a block of queries needs the scores of that block alone, so at most a block's scores are in
memory, forward and backward. The forward pass keeps its result and log Σ exp of each query's scores; the backward pass
makes the weights again from these, without a softmax:

    P = exp(S - lse)    dV = Pᵀ dO    dP = dO Vᵀ    dS = P (dP - Σ dO O)    dQ = dS K / √d    dK = dSᵀ Q / √d

Scores and softmax are float32, products take the inputs' dtype (arXiv 2205.14135 and 2307.08691, without their tiling
of keys: an XLA program has no on-chip memory to tile for).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from stable_lora_jax.models.float32_dot import float32_dot

_SMALLEST, _MOST = 64, 8  # queries in a block at least, blocks at most

# Letters: b rows, k key-value heads, n queries of a block in all query heads of one key-value head, s keys, h features.
_BKNH_BKSH = (((3,), (3,)), ((0, 1), (0, 1)))  # -> bkns
_BKNS_BKSH = (((3,), (2,)), ((0, 1), (0, 1)))  # -> bknh
_BKNS_BKNH = (((2,), (2,)), ((0, 1), (0, 1)))  # -> bksh

Queries = Float[Array, "batch length heads width"]
Keys = Float[Array, "batch length kv_heads width"]
Visible = Bool[Array, "#batch length length"]


@jax.custom_vjp
def blockwise_attention(query: Queries, key: Keys, value: Keys, visible: Visible) -> Queries:
    """Returns softmax(q kᵀ / √width) v for every query head, whose group of heads shares a key-value head.

    Args:
      query, key, value: rotated; heads is a multiple of kv_heads.
      visible: which keys each query sees, at least one; keys behind the query are never seen.
    """
    return _forward(query, key, value, visible)[0]


def _forward(query: Queries, key: Keys, value: Keys, visible: Visible) -> tuple[Queries, tuple[Array, ...]]:
    keys, values = _heads_first(key), _heads_first(value)
    outputs, normalisers = [], []
    for start, stop in _blocks(query.shape[1]):
        scores = _scores(query, keys, visible, start, stop)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        output = float32_dot(weights.astype(value.dtype), values[:, :, :stop], _BKNS_BKSH) / total
        outputs.append(_ungroup(output, stop - start).astype(value.dtype))
        normalisers.append(_ungroup(highest + jnp.log(total), stop - start))
    output = checkpoint_name(jnp.concatenate(outputs, 1), "kept")
    normaliser = checkpoint_name(jnp.concatenate(normalisers, 1), "kept")
    return output, (query, key, value, visible, output, normaliser)


def _backward(residuals: tuple[Array, ...], cotangent: Queries) -> tuple[Array, Array, Array, np.ndarray]:
    query, key, value, visible, output, normaliser = residuals
    kv_heads, keys, values = key.shape[2], _heads_first(key), _heads_first(value)
    scale = query.shape[-1] ** -0.5
    delta = jnp.sum(cotangent.astype(jnp.float32) * output.astype(jnp.float32), -1, keepdims=True)
    d_query, d_key, d_value = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for start, stop in _blocks(query.shape[1]):
        block = slice(start, stop)
        weights = jnp.exp(_scores(query, keys, visible, start, stop) - _group(normaliser[:, block], kv_heads))
        d_output = _group(cotangent[:, block].astype(value.dtype), kv_heads)
        d_value = d_value.at[:, :, :stop].add(float32_dot(weights.astype(value.dtype), d_output, _BKNS_BKNH))
        d_weights = float32_dot(d_output, values[:, :, :stop], _BKNH_BKSH)
        d_scores = (scale * weights * (d_weights - _group(delta[:, block], kv_heads))).astype(query.dtype)
        d_key = d_key.at[:, :, :stop].add(float32_dot(d_scores, _group(query[:, block], kv_heads), _BKNS_BKNH))
        d_query.append(_ungroup(float32_dot(d_scores, keys[:, :, :stop], _BKNS_BKSH), stop - start))
    return (
        jnp.concatenate(d_query, 1).astype(query.dtype),
        _heads_first(d_key).astype(key.dtype),
        _heads_first(d_value).astype(value.dtype),
        np.zeros(visible.shape, jax.dtypes.float0),
    )


blockwise_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yields the first query of every block, and the one behind its last."""
    size = max(_SMALLEST, -(-length // _MOST))
    return ((start, min(length, start + size)) for start in range(0, length, size))


def _scores(query: Queries, keys: Array, visible: Visible, start: int, stop: int) -> Float[Array, "b k n s"]:
    """Returns the scaled scores of a block of queries, the lowest number where nothing is seen."""
    kv_heads, scale = keys.shape[1], query.shape[-1] ** -0.5
    scores = float32_dot(_group(scale * query[:, start:stop], kv_heads), keys[:, :, :stop], _BKNH_BKSH)
    seen = visible[:, None, None, start:stop, :stop]
    # Added, not selected: it fuses with what follows.
    bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
    return (scores.reshape(*scores.shape[:2], -1, *bias.shape[3:]) + bias).reshape(scores.shape)


def _heads_first(array: Array) -> Array:
    """Swaps length and heads, either way."""
    return jnp.swapaxes(array, 1, 2)


def _group(array: Float[Array, "b t heads h"], kv_heads: int) -> Float[Array, "b k n h"]:
    """Returns the queries of each key-value head's group, group by group."""
    batch, length, heads, width = array.shape
    split = array.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return jnp.transpose(split, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, -1, width)


def _ungroup(array: Float[Array, "b k n h"], length: int) -> Float[Array, "b t heads h"]:
    """Undoes `_group`."""
    batch, kv_heads, _, width = array.shape
    split = array.reshape(batch, kv_heads, -1, length, width)
    return jnp.transpose(split, (0, 3, 1, 2, 4)).reshape(batch, length, -1, width)
