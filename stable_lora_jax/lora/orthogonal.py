"""A start with A B = 0 in which neither is zero: rows of one orthogonal matrix are dealt to A and to B.

With Q: (r, r) orthogonal, A = N₁ Q_even / 10 and B = Q_oddᵀ N₂ / 10, where N₁: (n, r/2) and N₂: (r/2, m) are standard
normal. So A B = N₁ (Q_even Q_oddᵀ) N₂ / 100 = 0 within rounding, and both have gradients from the first step on. PEFT
has it as `init_lora_weights="orthogonal"`. Entries of A and B have the variance 1/200, so a square layer's gap begins
near 1 and Stable-LoRA hardly shrinks it.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def orthogonal_start(
    key: Array, shape: tuple[int, ...], rank: int, dtype: DTypeLike
) -> tuple[Float[Array, "*stack n r"], Float[Array, "*stack r m"]]:
    """Returns A and B.

    Args:
      key: of the random stream.
      shape: (..., n, m), of the kernel; each of a stack gets its own.
      rank: r, even.
      dtype: of A and B.

    Raises:
      ValueError: an odd rank.
    """
    if rank % 2:
        raise ValueError(
            f"start='orthogonal' deals the rows of a matrix in two, and rank={rank} is odd. Take an even one."
        )
    *stack, fan_in, fan_out = shape
    for_q, for_a, for_b = jax.random.split(key, 3)
    q = jax.random.orthogonal(for_q, rank, tuple(stack))
    a = jax.random.normal(for_a, (*stack, fan_in, rank // 2)) @ q[..., ::2, :] / 10
    b = jnp.swapaxes(q[..., 1::2, :], -1, -2) @ jax.random.normal(for_b, (*stack, rank // 2, fan_out)) / 10
    return a.astype(dtype), b.astype(dtype)
