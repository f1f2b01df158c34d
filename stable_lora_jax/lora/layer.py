"""What every adapted layer has: A and B, their scale, and dropout before them."""

import math
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Variance 1/n for A: (n, r); the paper's "He" start. B starts at zero, so that a fresh adapter changes nothing.
A_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
B_INIT = nnx.initializers.zeros_init()


class LoRALayer(nnx.Module):
    """A: (..., n, r) and B: (..., r, m) of one layer, whose part of the output is s (x A) B.

    s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). A and B are `nnx.LoRAParam`.

    Args:
      shape: (..., n, m), of the kernel that they adapt; leading axes are of layers that a scan runs.
      rank: r >= 1.
      alpha: numerator of the scale.
      rngs: random streams; "params" for A and B, "dropout" for dropout.
      dtype: of A and B.
      use_rslora: as above.
      dropout: fraction of the entries of x that the adapter does not see while training, in [0, 1).
      a_init: initializer of one A, shape (n, r).
      b_init: initializer of one B, shape (r, m).

    Attributes:
      lora_a, lora_b: A and B.
      magnitude: of DoRA, (..., m); None without.

    Raises:
      ValueError: rank, alpha or dropout out of range.
    """

    magnitude: nnx.LoRAParam | None

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        use_rslora: bool = False,
        dropout: float = 0.0,
        a_init: Initializer = A_INIT,
        b_init: Initializer = B_INIT,
    ):
        _check_ranges(rank, alpha, dropout)
        *stack, fan_in, fan_out = shape
        # Python's numbers: one of NumPy's would widen a bfloat16 output.
        self.rank, self.alpha, self.use_rslora = operator.index(rank), float(alpha), use_rslora
        self.lora_a = nnx.LoRAParam(_stacked_init(a_init, rngs.params(), (*stack, fan_in, self.rank), dtype))
        self.lora_b = nnx.LoRAParam(_stacked_init(b_init, rngs.params(), (*stack, self.rank, fan_out), dtype))
        self.magnitude = nnx.data(None)  # a DoRA layer puts its own here
        self.dropout = _stacked_dropout(dropout, rngs, stack) if dropout else None

    @property
    def scale(self) -> float:
        """The factor s of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def added_to(self, kernel: Float[Array, "*stack n m"]) -> Float[Array, "*stack n m"]:
        """Returns kernel + s A B, in float32 or wider."""
        a, b = self.lora_a[...], self.lora_b[...]
        wide = jnp.promote_types(jnp.promote_types(kernel.dtype, a.dtype), jnp.float32)
        delta = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
        return kernel.astype(wide) + self.scale * delta


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
