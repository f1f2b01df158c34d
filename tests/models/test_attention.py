"""Which attention is chosen, and that both ways to say "all before" are one computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stable_lora_jax.models import attend, choose_attention, load_model
from tests.models import tiny


def test_a_cpu_computes_attention_by_xla():
    assert choose_attention("auto", dtype=jnp.bfloat16, head_dim=64) == "xla"
    assert choose_attention("xla", dtype=jnp.bfloat16, head_dim=64) == "xla"
    with pytest.raises(
        ValueError, match=r"'cudnn' does not work here: the device is a CPU, and cuDNN is for NVIDIA GPUs"
    ):
        choose_attention("cudnn", dtype=jnp.bfloat16, head_dim=64)
    with pytest.raises(
        ValueError, match=r"'splash' does not work here: the device is a CPU, and the splash kernel is for"
    ):
        choose_attention("splash", dtype=jnp.bfloat16, head_dim=64)
    with pytest.raises(ValueError, match=r"attention='flash' is unknown. Known: auto, xla, cudnn, splash."):
        choose_attention("flash", dtype=jnp.bfloat16, head_dim=64)


def test_the_wish_reaches_the_decoder(tmp_path):
    path = tiny.save(tmp_path, tiny.CONFIG, tiny.hf_tensors(tiny.decoder()))
    assert load_model(path).attention == load_model(path, attention="xla").attention == "xla"
    with pytest.raises(ValueError, match="'cudnn' does not work here"):
        load_model(path, attention="cudnn")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [9, 64, 150, 600])  # one block, one, three of which the last is short, eight
@pytest.mark.parametrize("masked", [True, False])
def test_equals_jax_own_attention(heads, kv_heads, length, masked):
    rng = np.random.default_rng(0)
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    seen = np.tril(rng.random((2, length, length)) < 0.5) | np.eye(length, dtype=bool)
    visible = jnp.asarray(seen) if masked else None

    def ours(query, key, value):
        return attend(query, key, value, visible, "xla")

    def theirs(query, key, value):
        mask = None if visible is None else visible[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=visible is None)

    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    for function in (lambda f: f, lambda f: jax.grad(lambda *args: jnp.sum(weights * f(*args)), argnums=(0, 1, 2))):
        for x, y in zip(*(jax.tree.leaves(function(f)(*inputs)) for f in (ours, theirs)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(2, 150, n, 8)), jnp.bfloat16) for n in (6, 2, 2)]
    exact = [x.astype(jnp.float32) for x in inputs]

    def total(*args):
        return jnp.sum(jnp.sin(attend(*args, None, "xla").astype(jnp.float32)))

    grad = jax.grad(total, argnums=(0, 1, 2))
    pairs = zip(
        (attend(*inputs, None, "xla"), *grad(*inputs)), (attend(*exact, None, "xla"), *grad(*exact)), strict=True
    )
    for found, wanted in pairs:
        assert found.dtype == jnp.bfloat16
        assert jnp.abs(found.astype(jnp.float32) - wanted).max() <= 2e-2 * jnp.abs(wanted).max()


def test_a_backward_pass_recomputes_no_softmax():
    """Under the decoder's policy, attention's result and normaliser are kept: the backward pass takes one exp."""
    inputs = [jnp.zeros((1, 9, 2, 8)) for _ in range(3)]
    kept = jax.checkpoint_policies.save_only_these_names("kept")
    attention = jax.checkpoint(lambda *args: attend(*args, None, "xla"), policy=kept)
    told = str(jax.make_jaxpr(jax.grad(lambda *args: attention(*args).sum()))(*inputs))
    assert told.count(" exp ") == 2  # one forward, one backward
    assert told.count(" log ") == 1


def test_rows_of_one_branch_are_plainly_causal():
    model, tokens = tiny.decoder(), tiny.tokens()
    # Two tokens of prefix, five of the branch, and padding.
    segments = jnp.asarray([[0, 0, 1, 1, 1, 1, 1, -1, -1]] * 2)
    with_segments = model.hidden_states(tokens, None, segments)[:, :7]
    np.testing.assert_array_equal(with_segments, model.hidden_states(tokens)[:, :7])
