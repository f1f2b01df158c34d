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
    with pytest.raises(ValueError, match=r"attention='flash' is unknown. Known: auto, xla, cudnn."):
        choose_attention("flash", dtype=jnp.bfloat16, head_dim=64)


def test_the_wish_reaches_the_decoder(tmp_path):
    path = tiny.save(tmp_path, tiny.CONFIG, tiny.hf_tensors(tiny.decoder()))
    assert load_model(path).attention == load_model(path, attention="xla").attention == "xla"
    with pytest.raises(ValueError, match="'cudnn' does not work here"):
        load_model(path, attention="cudnn")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_jax_own_attention(heads, kv_heads, masked):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 9, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    visible = jnp.asarray(rng.random((2, 9, 9)) < 0.5) | jnp.eye(9, dtype=bool) if masked else None

    def ours(query, key, value):
        return attend(query, key, value, visible, "xla")

    def theirs(query, key, value):
        mask = None if visible is None else visible[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=visible is None)

    weights = jnp.asarray(rng.normal(size=query.shape), jnp.float32)
    for function in (lambda f: f, lambda f: jax.grad(lambda *args: jnp.sum(weights * f(*args)), argnums=(0, 1, 2))):
        for x, y in zip(*(jax.tree.leaves(function(f)(query, key, value)) for f in (ours, theirs)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_rows_of_one_branch_are_plainly_causal():
    model, tokens = tiny.decoder(), tiny.tokens()
    # Two tokens of prefix, five of the branch, and padding.
    segments = jnp.asarray([[0, 0, 1, 1, 1, 1, 1, -1, -1]] * 2)
    with_segments = model.hidden_states(tokens, None, segments)[:, :7]
    np.testing.assert_array_equal(with_segments, model.hidden_states(tokens)[:, :7])
