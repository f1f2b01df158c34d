"""A linear layer with a LoRA adapter next to its frozen weight: y = x W + s (x A) B; or DoRA's form of it."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from stable_lora_jax.lora.dora import column_norms, rescaled
from stable_lora_jax.lora.layer import LoRALayer


class LoRALinear(LoRALayer):
    """y = x W + s (x A) B, with the scale and the options of `LoRALayer`.

    A and B are cast to the dtype of the base layer's output where they are used. A base layer stacked over leading axes
    gets adapters stacked alike. With `use_dora` the output is rescaled by column, to trained magnitudes (see
    `stable_lora_jax.lora.dora`).

    Args:
      base: the layer to adapt; kernel (..., n, m).
      rank, alpha, options: as `LoRALayer` takes them.
      use_dora: train the magnitude of every column too.

    Raises:
      ValueError: rank, alpha or dropout out of range; DoRA around a quantized layer.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, *, use_dora: bool = False, **options: Any):
        if use_dora and not jnp.issubdtype(base.kernel.dtype, jnp.floating):
            raise ValueError("DoRA needs the norms of the base's columns, and the base is quantized. Use one of them.")
        super().__init__(base.kernel.shape, rank, alpha, **options)
        self.base = base
        if use_dora:
            self.magnitude = nnx.LoRAParam(self._norms().astype(self.lora_a.dtype))

    def __call__(self, x: Float[Array, "*batch n"], out_sharding: Any = None) -> Float[Array, "*batch m"]:
        """Returns the base layer's output plus the adapter's, in the base layer's output dtype.

        Args:
          x: the input.
          out_sharding: of the output, as `nnx.Linear` takes it; for meshes with Explicit axes.
        """
        y = self.base(x) if out_sharding is None else self.base(x, out_sharding=out_sharding)
        x = x if self.dropout is None else self.dropout(x)
        # r numbers per token: a backward pass that computes the rest again keeps these.
        down = checkpoint_name(x.astype(y.dtype) @ self.lora_a[...].astype(y.dtype), "kept")
        up = jnp.matmul(self.scale * down, self.lora_b[...].astype(y.dtype), out_sharding=out_sharding)
        if self.magnitude is None:
            return y + up
        bias = None if self.base.bias is None else self.base.bias[...]
        return rescaled(y, up, bias, self.magnitude[...] / self._norms())

    def merged(self) -> nnx.Linear:
        """Returns the base layer, changed in place to compute the same; the sum is formed in float32 or wider."""
        kernel = self.base.kernel
        whole = self.added_to(kernel[...])
        if self.magnitude is not None:
            whole *= (self.magnitude[...].astype(whole.dtype) / self._norms())[..., None, :]
        kernel[...] = whole.astype(kernel.dtype)
        return self.base

    def _norms(self) -> Float[Array, "*stack m"]:
        return column_norms(self.base.kernel[...], self.lora_a[...], self.lora_b[...], self.scale)
