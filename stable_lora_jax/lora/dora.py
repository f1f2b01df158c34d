"""DoRA: weight-decomposed low-rank adaptation.

The layer's weight is ``m · (W + s A B) / ‖W + s A B‖``, column by column (an output feature each): A and B change the
direction, the trained magnitudes m the length. m starts at ‖W‖, so that a fresh adapter changes nothing. The norm is
constant in the backward pass, as in the paper's section 4.3 and in PEFT.

References:
  Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen: "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv 2402.09353.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.jit, static_argnames="scale")
def column_norms(
    kernel: Float[Array, "*stack n m"], a: Float[Array, "*stack n r"], b: Float[Array, "*stack r m"], scale: float
) -> Float[Array, "*stack m"]:
    """Returns ‖W + s A B‖ by column, in float32, and constant for the gradient.

    The sum is never formed: ‖w‖² + 2 s bᵀ (Aᵀ w) + s² bᵀ (AᵀA) b takes 2 n m r operations, those of r tokens, and no
    array of the kernel's size.

    Args:
      kernel: W, frozen.
      a, b: the adapter.
      scale: s.
    """
    kernel, a, b = (jax.lax.stop_gradient(x) for x in (kernel, a, b))
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    a, b = a.astype(wide), b.astype(wide)
    options = {"precision": "highest", "preferred_element_type": wide}
    cross = jnp.einsum("...nr,...nm->...rm", a, kernel, **options)
    gram = jnp.einsum("...nr,...nq->...rq", a, a, **options)
    square = jnp.sum(jnp.square(kernel.astype(wide)), -2) + 2 * scale * jnp.sum(b * cross, -2)
    square += scale**2 * jnp.sum(b * jnp.matmul(gram, b, precision="highest"), -2)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(wide).tiny))


def rescaled(
    base: Float[Array, "*batch m"],
    adapter: Float[Array, "*batch m"],
    bias: Float[Array, " m"] | None,
    factor: Float[Array, " m"],
) -> Float[Array, "*batch m"]:
    """Returns factor · (x W + s x A B) + bias, which is `base` to the last bit where the factor is 1 and B is 0.

    Args:
      base: x W + bias.
      adapter: s x A B.
      bias: the base layer's, if any.
      factor: m / ‖W + s A B‖.
    """
    factor = factor.astype(base.dtype)
    plain = base if bias is None else base - bias.astype(base.dtype)
    return base + (factor - 1) * plain + factor * adapter
