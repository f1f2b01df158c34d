"""Products with float32 results: those of their backward pass take low precision, and lose no more than it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.models.float32_dot import float32_dot
from tests.models import tiny

SCORES = (((4,), (3,)), ((0, 2), (0, 2)))
LOGITS = (((1,), (1,)), ((), ()))


# What loses too much in eight bits: the softmax, the norms' roots, the rotation's angles, the loss.
DELICATE = {"exp", "log", "rsqrt", "cos", "sin", "logistic", "reduce_max", "div"}


def operands(jaxpr, names):
    """Yields the dtypes of the floating operands of every operation of these names in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            found = (var.aval.dtype for var in eqn.invars)
            yield tuple(dtype for dtype in found if jnp.issubdtype(dtype, jnp.floating))
        for node in jax.tree.leaves(eqn.params, is_leaf=lambda node: hasattr(node, "eqns")):
            if hasattr(node, "eqns"):
                yield from operands(node, names)


@pytest.mark.parametrize(
    ("dimensions", "spec", "x_shape", "y_shape"),
    [(SCORES, "btkgh,bskh->bktgs", (2, 5, 3, 2, 8), (2, 7, 3, 8)), (LOGITS, "td,vd->tv", (6, 8), (20, 8))],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_einsum_in_float64(dimensions, spec, x_shape, y_shape, dtype):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x_shape, y_shape))
    value, transpose = jax.vjp(lambda x, y: float32_dot(x, y, dimensions), x, y)
    operands, result = spec.split("->")
    first, second = operands.split(",")
    exact_x, exact_y = np.float64(x), np.float64(y)
    np.testing.assert_allclose(value, np.einsum(spec, exact_x, exact_y), rtol=1e-5, atol=1e-5)
    assert value.dtype == jnp.float32
    cotangent = jnp.asarray(rng.normal(size=value.shape), jnp.float32)
    expected = (
        np.einsum(f"{result},{second}->{first}", np.float64(cotangent), exact_y),
        np.einsum(f"{result},{first}->{second}", np.float64(cotangent), exact_x),
    )
    for gradient, exact in zip(transpose(cotangent), expected, strict=True):
        assert gradient.dtype == dtype
        error = np.linalg.norm(np.float64(gradient) - exact) / np.linalg.norm(exact)
        assert error < (5e-3 if dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_bfloat16_model_multiplies_in_bfloat16_and_does_what_is_delicate_in_float32(tie_embeddings):
    graph, params = nnx.split(tiny.decoder(dtype=jnp.bfloat16, tie_embeddings=tie_embeddings))

    def loss(params):
        return jax.nn.logsumexp(nnx.merge(graph, params)(tiny.tokens())).sum()

    program = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    found = list(operands(program, {"dot_general"}))
    assert len(found) >= 3 * 10  # seven of weights, two of attention, the logits; and two of each in the backward pass
    assert {operand for each in found for operand in each} == {jnp.dtype(jnp.bfloat16)}
    assert {operand for each in operands(program, DELICATE) for operand in each} == {jnp.dtype(jnp.float32)}
