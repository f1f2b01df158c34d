"""RMS norms: Flax's, and one whose stored scale is an offset from 1, as Gemma's."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stable_lora_jax.models.config import DecoderConfig


class OffsetRMSNorm(nnx.RMSNorm):
    """x / rms(x) * (offset + scale), in float32 and rounded once; arguments as of `nnx.RMSNorm`."""

    def __init__(self, num_features: int, *, offset: float, **options):
        super().__init__(num_features, scale_init=nnx.initializers.constant(1 - offset), **options)
        self.offset = offset

    def __call__(self, x: Float[Array, "*rows width"], mask: None = None) -> Float[Array, "*rows width"]:
        """Returns the normalised features."""
        assert self.scale is not None
        values = x.astype(jnp.float32)
        size = jax.lax.rsqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True) + self.epsilon)
        return (values * size * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def rms_norm(
    config: DecoderConfig, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
) -> nnx.RMSNorm:
    """Returns a fresh norm of a decoder over `width` features."""
    options = {"epsilon": config.rms_norm_eps, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
    if config.norm_offset:
        return OffsetRMSNorm(width, offset=config.norm_offset, **options)
    return nnx.RMSNorm(width, **options)
