from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.models import Decoder, Llama3RopeScaling, LongRopeScaling, init_cache
from stable_lora_jax.models.rotary import rotary_frequencies
from tests.models import tiny

# Float32 sums in another order: a few units in the last place of logits of order one.
ROUNDING = {"rtol": 0, "atol": 1e-5}
MIXED = {"sliding_window": 3, "sliding_layers": (True, False, True), "sliding_rope_theta": 100.0}
MIXED |= {"rope_layers": (True, True, False)}


def log_probs(model, *args):
    return jax.nn.log_softmax(tiny.call(model, *args))


@pytest.mark.parametrize("tie", [True, False])
def test_abstract_model_allocates_nothing(tie):
    abstract = nnx.eval_shape(lambda: Decoder(tiny.config(tie_embeddings=tie), rngs=nnx.Rngs(0)))
    assert {type(leaf) for leaf in jax.tree.leaves(nnx.state(abstract))} == {jax.ShapeDtypeStruct}
    assert abstract.layers.self_attn.k_proj.kernel.shape == (3, 24, 8)
    assert (abstract.lm_head is None) == tie


def test_initial_layers_differ_and_have_the_stored_dtype():
    model = nnx.jit(lambda: Decoder(tiny.CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))()
    kernel = model.layers.self_attn.q_proj.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}


def test_a_token_does_not_see_the_future():
    model, tokens = tiny.decoder(), tiny.tokens()
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 61)
    before, after = tiny.call(model, tokens), tiny.call(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


def test_only_differences_of_positions_matter():
    model, tokens = tiny.decoder(), tiny.tokens()
    # The angles of shifted positions are rounded differently.
    np.testing.assert_allclose(
        tiny.call(model, tokens, jnp.arange(9)[None] + 7), tiny.call(model, tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("changes", [{}, MIXED], ids=["alike", "mixed layers"])
def test_shared_prefix_with_branches_equals_separate_rows(changes):
    model = tiny.decoder(**changes)
    prefix, first, second = (tiny.tokens(1, n, seed) for seed, n in enumerate((4, 3, 2)))
    row = jnp.concatenate([prefix, first, second, jnp.zeros((1, 3), int)], axis=1)
    segments = jnp.array([[0] * 4 + [1] * 3 + [2] * 2 + [-1] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 0, 0]])
    together = log_probs(model, row, positions, segments)
    alone = [log_probs(model, jnp.concatenate([prefix, branch], axis=1)) for branch in (first, second)]
    np.testing.assert_allclose(together[:, :7], alone[0], **ROUNDING)
    np.testing.assert_allclose(together[:, 7:9], alone[1][:, 4:], **ROUNDING)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("changes", [{}, MIXED], ids=["alike", "mixed layers"])
def test_packed_documents_do_not_see_each_other(changes):
    model, (first, second) = tiny.decoder(**changes), (tiny.tokens(1, 5, 1), tiny.tokens(1, 4, 2))
    row = jnp.concatenate([first, second], axis=1)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    packed = tiny.call(model, row, positions, jnp.array([[1] * 5 + [2] * 4]))
    np.testing.assert_allclose(
        packed, np.concatenate([tiny.call(model, first), tiny.call(model, second)], axis=1), **ROUNDING
    )


def test_long_packed_rows_are_refused_where_the_rotation_depends_on_length():
    scaling = LongRopeScaling(
        short_factor=(1.0, 1.0), long_factor=(2.0, 2.0), original_max_positions=8, attention_factor=1.0
    )
    model = tiny.decoder(rope_scaling=scaling)
    tiny.call(model, tiny.tokens(1, 8), None, None, jnp.zeros((1, 8), int))
    tiny.call(model, tiny.tokens(1, 9))
    with pytest.raises(ValueError, match=r"Packed rows of 9 tokens: LongRoPE.*at most that, or do not pack"):
        tiny.call(model, tiny.tokens(1, 9), None, None, jnp.zeros((1, 9), int))


def test_cached_equals_uncached_for_rows_of_different_length():
    model, tokens = tiny.decoder(), tiny.tokens(2, 9)
    lengths = np.array([6, 4])  # the second row's prompt is padded by two tokens
    cache = init_cache(model.config, 2, 12)
    extend = nnx.jit(lambda model, *args: model.extend(*args))
    _, cache = extend(model, tokens[:, :6], jnp.broadcast_to(jnp.arange(6), (2, 6)), cache)
    expected = tiny.call(model, tokens)
    for step in range(3):
        positions = jnp.asarray(lengths + step)[:, None]
        hidden, cache = extend(model, jnp.take_along_axis(tokens, positions, axis=1), positions, cache)
        got = model.logits(hidden[:, 0])
        np.testing.assert_allclose(got, expected[jnp.arange(2), positions[:, 0]], **ROUNDING)


def test_remat_has_the_same_gradients():
    tokens = tiny.tokens()

    def gradients(remat):
        graph, params = nnx.split(tiny.decoder(remat=remat))

        def loss(params):
            return jax.nn.log_softmax(nnx.merge(graph, params)(tokens))[..., 3].sum()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients(False), gradients(True))


@pytest.mark.parametrize(
    "changes",
    [
        MIXED,
        {"norms": "post", "qk_norm": "projection"},
        {"norms": "both", "residual_scale": 0.5, "remat": True},
        {"num_layers": 1},
    ],
    ids=["mixed layers", "norms after", "norms around", "one layer"],
)
def test_what_is_read_of_the_last_layer_is_that_of_all_tokens(changes):
    tokens, read_at = tiny.tokens(), jnp.array([[1, 8, 1], [0, 5, 7]])  # a token may be read twice, in any order

    def loss_and_gradients(unroll, inside):
        graph, params = nnx.split(tiny.decoder(**changes))

        def loss(params):
            model: Any = nnx.merge(graph, params)
            model.unroll = unroll
            hidden = model.hidden_states(tokens, read_at=read_at if inside else None)
            read = hidden if inside else jnp.take_along_axis(hidden, read_at[..., None], axis=1)
            return jnp.sin(read).sum(), read

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = loss_and_gradients(unroll=False, inside=False)
    assert expected[0][1].shape == (2, 3, 24)
    for unroll in (False, True):
        found = loss_and_gradients(unroll, inside=True)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_bfloat16_computation_keeps_float32_logits():
    tokens, reference = tiny.tokens(), tiny.call(tiny.decoder(), tiny.tokens())
    model = tiny.decoder(dtype=jnp.bfloat16)
    assert nnx.eval_shape(lambda model: model.hidden_states(tokens), model).dtype == jnp.bfloat16
    logits = tiny.call(model, tokens)
    assert logits.dtype == jnp.float32
    assert model.layers.mlp.up_proj.kernel.dtype == jnp.float32
    # bfloat16 has 8 significant bits; the errors of three layers add up to a few percent of the logits' scale.
    assert np.abs(logits - reference).max() < 0.05 * np.abs(reference).max()


def test_program_does_not_grow_with_depth():
    def lines(num_layers):
        def build():
            return Decoder(tiny.config(num_layers=num_layers), rngs=nnx.Rngs(0))

        graph, params = nnx.split(nnx.eval_shape(build))

        def loss(params):
            return jax.nn.log_softmax(nnx.merge(graph, params)(tiny.tokens()))[..., 0].sum()

        return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

    assert lines(2) == lines(8)


class NoisyAdapter(nnx.Module):
    """Any module may replace a projection; this one has all kinds of state."""

    def __init__(self, base: nnx.Linear, num_layers: int):
        n, m = base.kernel.shape[1:]
        self.base = base
        self.lora_a = nnx.Param(jnp.full((num_layers, n, 2), 0.1))
        self.lora_b = nnx.Param(jnp.full((num_layers, 2, m), 0.1))
        self.dropout: Any = nnx.Dropout(0.5)
        self.dropout.rngs = nnx.Rngs(dropout=3)["dropout"].split(num_layers)

    def __call__(self, x):
        return self.base(x) + self.dropout(x) @ self.lora_a[...] @ self.lora_b[...]


def noisy_decoder() -> tuple[Decoder, NoisyAdapter]:
    model = tiny.decoder()
    attention: Any = model.layers.self_attn
    attention.q_proj = NoisyAdapter(attention.q_proj, model.config.num_layers)
    return model, attention.q_proj


@pytest.mark.parametrize("remat", [False, True])
def test_state_of_a_replaced_projection_is_written_back(remat):
    (model, adapter), tokens = noisy_decoder(), tiny.tokens()
    model.remat = remat
    assert not np.allclose(tiny.call(model, tokens), tiny.call(model, tokens))
    np.testing.assert_array_equal(adapter.dropout.rngs.count[...], [2, 2, 2])
    model.eval()
    np.testing.assert_array_equal(tiny.call(model, tokens), tiny.call(model, tokens))


def test_llama3_frequencies_by_hand():
    # 32 positions: the frequencies 1, 0.1, 0.01 turn 5.09, 0.51 and 0.05 times: kept, interpolated... divided by 8.
    scaling = Llama3RopeScaling(factor=8.0, low_freq_factor=0.25, high_freq_factor=1.0, original_max_positions=32)
    kept = (32 * 0.1 / (2 * np.pi) - 0.25) / 0.75
    expected = [1.0, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8]
    np.testing.assert_allclose(rotary_frequencies(6, 1000.0, scaling), expected, rtol=1e-6)
