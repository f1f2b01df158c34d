"""The splash kernel, run operation by operation, against JAX's plain attention, and a decoder's use of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.models import Decoder
from stable_lora_jax.models.splash import splash_attention
from stable_lora_jax.training import make_mesh
from stable_lora_jax.training.sharding import placement_on
from tests.models import tiny

interpreted = functools.partial(splash_attention, interpret=True)


@pytest.mark.parametrize(("length", "heads", "kv_heads", "width"), [(300, 4, 2, 64), (128, 3, 1, 16), (520, 2, 2, 128)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_jax_own_attention(length, heads, kv_heads, width, packed, window, dtype):
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(2, length, n, width)), dtype) for n in (heads, kv_heads, kv_heads)]
    documents = jnp.asarray(np.sort(rng.integers(-1, 4, (2, length)))[:, ::-1]) if packed else None
    behind = np.arange(length)[:, None] - np.arange(length)
    seen = jnp.asarray((behind >= 0) & (behind < (window or length)))[None]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    weights = jnp.asarray(rng.normal(size=inputs[0].shape), jnp.float32)

    def theirs(*args):
        return jax.nn.dot_product_attention(*args, mask=seen[:, None])

    def ours(*args):
        return interpreted(*args, documents, window)

    exact = [each.astype(jnp.float32) for each in inputs]
    most = 1e-5 if dtype == jnp.float32 else 2e-2

    def gradient(function):
        return jax.grad(lambda *args: jnp.sum(weights * function(*args)), argnums=(0, 1, 2))

    for mine, plain in ((ours, theirs), (gradient(ours), gradient(theirs))):
        found, wanted = jax.tree.leaves(jax.jit(mine)(*inputs)), jax.tree.leaves(jax.jit(plain)(*exact))
        for x, y in zip(found, wanted, strict=True):
            assert x.dtype == dtype
            assert jnp.abs(x.astype(jnp.float32) - y).max() <= most * max(1, jnp.abs(y).max())


@pytest.fixture
def on_any_device(monkeypatch):
    """Lets decoders run the kernel itself where there is no TPU."""
    monkeypatch.setattr("stable_lora_jax.models.decoder.splash_attention", interpreted)


def decoders(**changes):
    """Two decoders of one set of weights, one of which attends by the kernel."""
    plain, by_kernel = tiny.decoder(**changes), tiny.decoder(**changes)
    by_kernel.attention = "splash"
    return plain, by_kernel


def hidden_and_gradient(model: Decoder, *args):
    def total(state):
        return jnp.sum(jnp.sin(nnx.merge(graph, state).hidden_states(*args)))

    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state).hidden_states(*args))(state), jax.jit(jax.grad(total))(state)


PACKED = jnp.asarray([[0] * 5 + [1] * 3 + [-1], [0] * 2 + [1] * 7])


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": 3, "sliding_layers": (True, True, True)},
        {"model_type": "gemma3_text", "sliding_window": 3, "sliding_layers": (True, False, True)},
    ],
    ids=["causal", "window", "windows of two kinds"],
)
def test_a_decoder_computes_the_same_with_it(changes, remat):
    plain, by_kernel = decoders(**changes, remat=remat)
    for args in ((tiny.tokens(),), (tiny.tokens(), None, None, PACKED)):
        for x, y in zip(
            *map(jax.tree.leaves, (hidden_and_gradient(m, *args) for m in (plain, by_kernel))), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def calls_of_kernels(model, *args):
    return str(jax.make_jaxpr(model.hidden_states)(*args)).count("pallas_call")


def test_it_is_used_where_it_can_be_and_nowhere_else():
    tokens, branches = tiny.tokens(), jnp.asarray([[0, 0, 0, 1, 1, 2, 2, -1, -1]] * 2)
    plain, by_kernel = decoders()
    assert calls_of_kernels(by_kernel, tokens) == calls_of_kernels(by_kernel, tokens, None, None, PACKED) == 1
    assert calls_of_kernels(by_kernel, tokens, None, branches) == calls_of_kernels(plain, tokens) == 0
    _, two_kinds = decoders(model_type="gemma3_text", sliding_window=3, sliding_layers=(True, False, True))
    assert calls_of_kernels(two_kinds, tokens) == 0
    # What is written out instead sees what it should.
    np.testing.assert_array_equal(
        by_kernel.hidden_states(tokens, None, branches), plain.hidden_states(tokens, None, branches)
    )


@pytest.mark.usefixtures("on_any_device")
def test_on_a_mesh_every_device_runs_it_for_its_own_rows_and_heads(eight_devices):
    plain, by_kernel = decoders()
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=eight_devices)
    by_kernel.placement = placement_on(mesh)
    tokens, documents = jnp.tile(tiny.tokens(), (2, 1)), jnp.tile(PACKED, (2, 1))
    expected, _ = hidden_and_gradient(plain, tokens, None, None, documents)
    with jax.set_mesh(mesh):
        found, gradient = hidden_and_gradient(by_kernel, tokens, None, None, documents)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert "shard_map" in str(jax.make_jaxpr(by_kernel.hidden_states)(tokens, None, None, documents))
