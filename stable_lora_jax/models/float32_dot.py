"""A matrix product of low-precision arrays with float32 results, forward only: its gradients stay in low precision.

JAX transposes a product with `preferred_element_type=float32` to products of the float32 cotangent with the other
operand, which is first converted to float32. On matrix units that is several times slower, and the conversion of an
embedding writes it once more at twice its size. Rounding the cotangent instead costs no more than rounding activations.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import DotDimensionNumbers
from jaxtyping import Array, Float


def float32_dot(
    x: Array,
    y: Array,
    dimension_numbers: DotDimensionNumbers,
    precision: None = None,
    out_sharding: None = None,
) -> Float[Array, "..."]:
    """Returns x · y in float32; a `jax.lax.dot_general` for `nnx.Linear`.

    The products of the backward pass take the cotangent rounded to the operands' dtype, and give gradients of it.

    Args:
      x: of the same dtype as y.
      y: of the same dtype as x.
      dimension_numbers: as for `jax.lax.dot_general`: axes contracted, axes shared.
      precision, out_sharding: what `nnx.Linear` passes on; nothing but the default.
    """
    assert precision is None, precision
    assert out_sharding is None, out_sharding
    return _product(dimension_numbers, x, y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dimension_numbers: DotDimensionNumbers, x: Array, y: Array) -> Array:
    return jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=jnp.float32)


def _forward(dimension_numbers: DotDimensionNumbers, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(dimension_numbers, x, y), (x, y)


def _backward(
    dimension_numbers: DotDimensionNumbers, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    _, transpose = jax.vjp(lambda x, y: jax.lax.dot_general(x, y, dimension_numbers), *operands)
    return transpose(cotangent.astype(operands[0].dtype))


_product.defvjp(_forward, _backward)
