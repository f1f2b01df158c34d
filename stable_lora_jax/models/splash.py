"""Attention on TPUs by JAX's splash attention kernel: a row's scores stay on the chip, forward and backward.

The kernel takes a causal mask, with a window or without, and the document of each token, and skips blocks of keys that
no query of a block sees. Rows are padded to whole blocks of 128 tokens.

References:
  jax.experimental.pallas.ops.tpu.splash_attention, of JAX; the algorithm is FlashAttention's (Dao: "FlashAttention-2",
  2023, arXiv 2307.08691).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

_LANES = 128  # tokens in the smallest block
_BLOCKS = (512, 256, 128)  # tokens in a block; the largest that divides a row is taken


def splash_attention(
    query: Float[Array, "batch length heads width"],
    key: Float[Array, "batch length kv_heads width"],
    value: Float[Array, "batch length kv_heads width"],
    documents: Int[Array, "batch length"] | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "batch length heads width"]:
    """Returns causal softmax(q kᵀ / √width) v for every query head, whose group of heads shares a key-value head.

    Args:
      query, key, value: rotated; heads is a multiple of kv_heads.
      documents: tokens see those of their own document alone, >= 0; None: a row is one document.
      window: keys that a query sees at most, itself among them; None: all.
      interpret: run the kernel operation by operation, as it can be on any device, slowly.
    """
    _, length, heads, width = query.shape
    padding = -length % _LANES
    whole = length + padding
    block = next(size for size in _BLOCKS if whole % size == 0)
    shape = (whole, whole)
    mask = (
        splash_attention_mask.CausalMask(shape)
        if window is None
        else splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="kept",
        interpret=interpret,
    )
    query, key, value = (
        jnp.pad(jnp.swapaxes(each, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for each in (query * width**-0.5, key, value)
    )
    given: tuple[Any, ...] = (query, key, value)
    if documents is not None:  # else what is padded comes last, where nothing sees it
        ids = jnp.pad(documents, ((0, 0), (0, padding)), constant_values=-1)
        given = (*given, splash_attention_kernel.SegmentIds(ids, ids))
    attended: Any = jax.vmap(kernel)(*given)
    return jnp.swapaxes(attended[:, :, :length], 1, 2).astype(value.dtype)
