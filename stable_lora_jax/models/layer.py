"""One layer of a decoder: attention and feed-forward part, each normalised and added to the residual stream."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stable_lora_jax.models.cache import KVCache
from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.norms import rms_norm
from stable_lora_jax.models.rotary import Rotation, rotate

# One object, not one per model: graph definitions compare initializers by identity, and jit caches compare those.
WEIGHT_INIT = nnx.initializers.normal(0.02)

# What the backward pass keeps; the rest is computed again.
_kept = partial(checkpoint_name, name="kept")

Hidden = Float[Array, "batch length width"]
Read = Float[Array, "batch targets width"]  # of all tokens of a row, or of some

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class AttentionInputs(NamedTuple):
    """Where a layer's tokens are, and how they attend.

    Attributes:
      positions: of the tokens.
      rotation: of queries and keys.
      attend: from queries, keys and values (batch, length, heads, width) to what is attended, shaped as the queries.
      read_at: of which tokens of a row the layer's output is wanted; None: of all.
    """

    positions: Int[Array, "#batch length"]
    rotation: Rotation
    attend: Callable[[Array, Array, Array], Array]
    read_at: Int[Array, "batch targets"] | None = None

    def read(self, x: Hidden) -> Read:
        """Returns the tokens whose output is wanted."""
        return x if self.read_at is None else rows_at(x, self.read_at)


def rows_at(x: Hidden, places: Int[Array, "batch targets"]) -> Read:
    """Returns the features of some tokens of each row."""
    return jnp.take_along_axis(x, places[..., None], axis=1)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        # `attend` divides scores by the root of the width.
        scale = config.attention_scale
        self.query_scale = 1.0 if scale is None else scale * config.head_dim**0.5
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = partial(nnx.Linear, kernel_init=WEIGHT_INIT, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.q_proj = linear(config.hidden_size, query_width, use_bias=config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_width, use_bias=config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_width, use_bias=config.qkv_bias)
        self.o_proj = linear(query_width, config.hidden_size, use_bias=config.o_bias)
        norm = partial(rms_norm, config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        if config.qk_norm:
            whole = config.qk_norm == "projection"
            self.q_norm = norm(query_width if whole else config.head_dim)
            self.k_norm = norm(kv_width if whole else config.head_dim)

    def __call__(
        self,
        x: Hidden,
        inputs: AttentionInputs,
        cache: KVCache | None,
        layer: Int[Array, ""],
    ) -> tuple[Read, KVCache | None]:
        """Returns the attended values where they are read, and the cache, if any, with this layer's keys and values."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        query, key, value = (_kept(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (each.reshape(split) for each in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, inputs.rotation), rotate(key, inputs.rotation)
        if self.query_scale != 1:
            query = self.query_scale * query
        if cache is not None:
            cache = cache.write(layer, inputs.positions, key, value)
            key, value = cache.keys[layer], cache.values[layer]
        attended = inputs.read(inputs.attend(query, key, value).reshape(batch, length, -1))
        return _kept(self.o_proj(attended)), cache


class FeedForward(nnx.Module):
    """Gated linear units: down(f(gate(x)) * up(x)), f SiLU or GELU; arXiv 2002.05202, eq. 6."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        options: dict[str, Any] = {"kernel_init": WEIGHT_INIT, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        linear = partial(nnx.Linear, use_bias=config.mlp_bias, **options)
        self.activation = config.activation
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Read) -> Read:
        """Returns the transformed features."""
        # In float32 up to one rounding at the end: rounding every step, as bfloat16 would, costs more than the steps.
        gate, up = (_kept(projection(x)).astype(jnp.float32) for projection in (self.gate_proj, self.up_proj))
        return self.down_proj((_ACTIVATIONS[self.activation](gate) * up).astype(x.dtype))


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); or x + norm(attention(x)), or both norms.

    Hugging Face's names are kept: `post_attention_layernorm` is the feed-forward part's input norm where layers
    normalise inputs alone, and the norm of what attention gives elsewhere.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        norm = partial(rms_norm, config, config.hidden_size, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norms, self.residual_scale = config.norms, config.residual_scale
        if self.norms != "post":
            self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.post_attention_layernorm = norm()
        if self.norms == "both":
            self.pre_feedforward_layernorm = norm()
        if self.norms != "pre":
            self.post_feedforward_layernorm = norm()
        self.mlp = FeedForward(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self,
        x: Hidden,
        inputs: AttentionInputs,
        cache: KVCache | None,
        layer: Int[Array, ""],
    ) -> tuple[Read, KVCache | None]:
        """Returns the residual stream where it is read, and the cache, if any, with this layer's keys and values."""
        normal = x if self.norms == "post" else self.input_layernorm(x)
        attended, cache = self.self_attn(normal, inputs, cache, layer)
        x = inputs.read(x)
        if self.norms == "pre":
            x = self._add(x, attended)
            return self._add(x, self.mlp(self.post_attention_layernorm(x))), cache
        x = self._add(x, self.post_attention_layernorm(attended))
        normal = x if self.norms == "post" else self.pre_feedforward_layernorm(x)
        return self._add(x, self.post_feedforward_layernorm(self.mlp(normal))), cache

    def _add(self, x: Read, change: Read) -> Read:
        return x + (change if self.residual_scale == 1 else self.residual_scale * change)
