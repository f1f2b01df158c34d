"""The keys and values of past tokens, kept for generation."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stable_lora_jax.models.config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of all layers; the slot of a token is its position."""

    keys: Float[Array, "layers batch slots kv_heads width"]
    values: Float[Array, "layers batch slots kv_heads width"]

    def write(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "batch length"],
        keys: Float[Array, "batch length kv_heads width"],
        values: Float[Array, "batch length kv_heads width"],
    ) -> "KVCache":
        """Returns the cache with one layer's new keys and values at `positions`; those beyond the slots are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            keys=self.keys.at[layer, rows, positions].set(keys, mode="drop"),
            values=self.values.at[layer, rows, positions].set(values, mode="drop"),
        )


def init_cache(config: DecoderConfig, batch_size: int, num_slots: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Returns an empty cache for `batch_size` rows of up to `num_slots` tokens each.

    Args:
      config: of the decoder that will fill it.
      batch_size: rows.
      num_slots: tokens per row, prompt and answer together.
      dtype: the decoder's computation dtype.
    """
    shape = (config.num_layers, batch_size, num_slots, config.num_kv_heads, config.head_dim)
    return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))
