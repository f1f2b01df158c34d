"""A linear layer with a LoRA adapter next to its frozen weight: y = x W + s (x A) B; or DoRA's form of it."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stable_lora_jax.lora.dora import column_norms, rescaled

# Variance 1/n for A: (n, r); the paper's "He" start. B starts at zero, so that a fresh adapter changes nothing.
A_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
B_INIT = nnx.initializers.zeros_init()


class LoRALinear(nnx.Module):
    """y = x W + s (x A) B, with s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).

    A and B are `nnx.LoRAParam`, kept in `dtype` and cast to the dtype of the base layer's output where they are used.
    A base layer stacked over leading axes, as layers run by a scan are, gets adapters stacked alike. With `use_dora`
    the output is rescaled by column, to trained magnitudes (see `stable_lora_jax.lora.dora`).

    Args:
      base: the layer to adapt; kernel (..., n, m).
      rank: r >= 1.
      alpha: numerator of the scale s.
      rngs: random streams; "params" for A and B, "dropout" for dropout.
      dtype: of the stored adapter.
      use_rslora: scale by alpha / sqrt(r).
      dropout: fraction of the entries of x that the adapter does not see while training, in [0, 1).
      a_init: initializer of one A, shape (n, r).
      b_init: initializer of one B, shape (r, m).
      use_dora: train the magnitude of every column too.

    Attributes:
      lora_a, lora_b: A and B.
      magnitude: of DoRA, (..., m); None without.

    Raises:
      ValueError: rank, alpha or dropout out of range; DoRA around a quantized layer.
    """

    def __init__(
        self,
        base: nnx.Linear,
        rank: int,
        alpha: float,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        use_rslora: bool = False,
        dropout: float = 0.0,
        a_init: Initializer = A_INIT,
        b_init: Initializer = B_INIT,
        use_dora: bool = False,
    ):
        _check_ranges(rank, alpha, dropout)
        if use_dora and not jnp.issubdtype(base.kernel.dtype, jnp.floating):
            raise ValueError("DoRA needs the norms of the base's columns, and the base is quantized. Use one of them.")
        *stack, fan_in, fan_out = base.kernel.shape
        self.base = base
        # Python's numbers: one of NumPy's would widen a bfloat16 output.
        self.rank, self.alpha, self.use_rslora = operator.index(rank), float(alpha), use_rslora
        self.lora_a = nnx.LoRAParam(_stacked_init(a_init, rngs.params(), (*stack, fan_in, self.rank), dtype))
        self.lora_b = nnx.LoRAParam(_stacked_init(b_init, rngs.params(), (*stack, self.rank, fan_out), dtype))
        self.magnitude = nnx.LoRAParam(self._norms().astype(dtype)) if use_dora else None
        self.dropout = _stacked_dropout(dropout, rngs, stack) if dropout else None

    @property
    def scale(self) -> float:
        """The factor s of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def __call__(self, x: Float[Array, "*batch n"], out_sharding: Any = None) -> Float[Array, "*batch m"]:
        """The base layer's output plus the adapter's, in the base layer's output dtype.

        Args:
          x: the input.
          out_sharding: of the output, as `nnx.Linear` takes it; for meshes with Explicit axes.
        """
        y = self.base(x) if out_sharding is None else self.base(x, out_sharding=out_sharding)
        x = x if self.dropout is None else self.dropout(x)
        down = x.astype(y.dtype) @ self.lora_a[...].astype(y.dtype)
        up = jnp.matmul(self.scale * down, self.lora_b[...].astype(y.dtype), out_sharding=out_sharding)
        if self.magnitude is None:
            return y + up
        bias = None if self.base.bias is None else self.base.bias[...]
        return rescaled(y, up, bias, self.magnitude[...] / self._norms())

    def merged_kernel(self) -> Float[Array, "*stack n m"]:
        """Returns the kernel of the one Linear that computes the same; the sum is formed in float32 or wider."""
        kernel, a, b = self.base.kernel, self.lora_a[...], self.lora_b[...]
        wide = jnp.promote_types(jnp.promote_types(kernel.dtype, a.dtype), jnp.float32)
        delta = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
        whole = kernel[...].astype(wide) + self.scale * delta
        if self.magnitude is not None:
            whole *= (self.magnitude[...].astype(wide) / self._norms())[..., None, :]
        return whole.astype(kernel.dtype)

    def _norms(self) -> Float[Array, "*stack m"]:
        return column_norms(self.base.kernel[...], self.lora_a[...], self.lora_b[...], self.scale)


def _check_ranges(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank} is not a positive integer. LoRA ranks are 1 or more; 8 is a usual choice.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} is not a positive number. The adapter's scale is alpha / rank; 16 is usual.")
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout={dropout} is not in [0, 1). It is the fraction of inputs dropped; 0 switches it off."
        )


def _stacked_init(init: Initializer, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns an array whose last two axes are drawn by `init` as if they stood alone, with a key for each matrix."""
    *stack, rows, columns = shape
    keys = jax.random.split(key, math.prod(stack))
    return jax.vmap(lambda k: init(k, (rows, columns), dtype))(keys).reshape(shape)


def _stacked_dropout(rate: float, rngs: nnx.Rngs, stack: list[int]) -> nnx.Dropout:
    """Returns a dropout layer whose random state is stacked like the base layer it serves."""

    def make(rngs: nnx.Rngs) -> nnx.Dropout:
        return nnx.Dropout(rate, rngs=rngs)

    for size in reversed(stack):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make))
    return make(rngs)
