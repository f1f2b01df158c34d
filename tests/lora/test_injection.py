"""Adapters in any NNX model: a fresh one changes nothing, a merged one is the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from stable_lora_jax.lora import (
    LoRALinear,
    QuantizedLinear,
    inject_lora,
    lora_modules,
    merge_lora,
    quantize_linears,
)
from stable_lora_jax.lora.injection import adaptable_layers
from stable_lora_jax.models import Decoder, DecoderConfig
from tests.models import tiny

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, max_positions=64,
)  # fmt: skip
TOKENS = jnp.arange(24).reshape(2, 12)


class Mixed(nnx.Module):
    """A model that is not ours: lists, names of its own, a bias, two stack axes."""

    def __init__(self, rngs, **dtypes):
        linear = functools.partial(nnx.Linear, **dtypes)
        self.blocks = nnx.List([linear(8, 8, rngs=rngs), linear(8, 8, use_bias=False, rngs=rngs)])
        self.head = nnx.Dict(out=linear(8, 4, rngs=rngs))
        self.experts = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: linear(4, 4, rngs=rngs)))(rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = jax.nn.relu(block(x))
        x = self.head["out"](x)
        return nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None))(self.experts, x)


def decoder(**kwargs):
    return Decoder(CONFIG, rngs=nnx.Rngs(0), **kwargs), TOKENS


def mixed(**dtypes):
    return Mixed(nnx.Rngs(0), **dtypes), jnp.linspace(-1, 1, 40).reshape(5, 8)


def randomized(model):
    """Gives every B random values, so that the adapters matter."""
    for i, module in enumerate(lora_modules(model).values()):
        module.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(i), module.lora_b.shape, module.lora_b.dtype)
    return model


@pytest.mark.parametrize("make", [decoder, mixed])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_leaves_the_outputs_bitwise_unchanged(make, param_dtype):
    model, inputs = make(param_dtype=param_dtype, dtype=param_dtype)
    before = nnx.jit(lambda m, x: m(x))(model, inputs)
    inject_lora(model, 2, 32.0, r".*", rngs=nnx.Rngs(1))
    assert all(module.lora_a.dtype == jnp.float32 for module in lora_modules(model).values())
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(model, inputs), before)


@pytest.mark.parametrize("make", [decoder, mixed])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_equals_injected(make, use_rslora):
    model, inputs = make()
    before = model(inputs)
    randomized(inject_lora(model, 4, 8.0, r".*", rngs=nnx.Rngs(1), use_rslora=use_rslora))
    injected = model(inputs)
    merge_lora(model)
    assert not lora_modules(model)
    # Two orders of the same float32 sums.
    np.testing.assert_allclose(model(inputs), injected, atol=2e-5)
    assert jnp.abs(injected - before).max() > 1e-2


def test_merging_rounds_once():
    linear = nnx.Linear(64, 32, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = randomized(inject_lora(nnx.Sequential(linear), 4, 8.0, ["0"], rngs=nnx.Rngs(1)))
    (module,) = lora_modules(model).values()
    a, b = np.float64(module.lora_a[...]), np.float64(module.lora_b[...])
    exact = jnp.asarray(np.float64(linear.kernel[...]) + 8.0 / 4 * a @ b, jnp.bfloat16)
    merge_lora(model)
    # Float32 sums beside a rounding boundary may fall on its other side; a product in bfloat16 misses a third of all.
    assert (np.asarray(linear.kernel[...]) != np.asarray(exact)).mean() < 0.01


def test_a_number_of_numpy_widens_nothing():
    linear = nnx.Linear(8, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = inject_lora(nnx.Sequential(linear), 2, np.float64(4), ["0"], rngs=nnx.Rngs(1))
    assert model(jnp.ones((1, 8), jnp.bfloat16)).dtype == jnp.bfloat16


def test_one_layer_is_the_formula():
    x, w = np.random.default_rng(0).normal(size=(5, 8)), nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    model = nnx.Sequential(w)
    randomized(inject_lora(model, 3, 6.0, ["0"], rngs=nnx.Rngs(1)))
    (module,) = lora_modules(model).values()
    a, b = np.float64(module.lora_a[...]), np.float64(module.lora_b[...])
    expected = x @ np.float64(w.kernel[...]) + np.float64(w.bias[...]) + 6.0 / 3 * (x @ a) @ b
    np.testing.assert_allclose(model(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("qv", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("qkvo", ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]),
        (["self_attn.k_proj", "up_proj"], ["mlp.up_proj", "self_attn.k_proj"]),
        (r"layers\.mlp\..*", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        (
            "all-linear",
            [f"mlp.{each}_proj" for each in ("down", "gate", "up")]
            + [f"self_attn.{each}_proj" for each in ("k", "o", "q", "v")],
        ),
    ],
)
def test_targets(targets, names):
    model, _ = decoder()
    inject_lora(model, 2, 4.0, targets, rngs=nnx.Rngs(1))
    assert sorted(lora_modules(model)) == [f"layers.{name}" for name in names]


def test_patterns_and_what_is_left_out():
    model, _ = decoder()
    patterns = {"rank_pattern": {"q_proj": 3, r"self_attn\.\w_proj": 5}, "alpha_pattern": {"o_proj": 10}}
    inject_lora(model, 2, 4.0, "all-linear", rngs=nnx.Rngs(1), exclude=["mlp.gate_proj", "v_proj"], **patterns)
    found = {path.rpartition(".")[2]: (m.rank, m.scale) for path, m in lora_modules(model).items()}
    assert found == {
        "q_proj": (3, 4 / 3),
        "k_proj": (5, 4 / 5),
        "o_proj": (5, 2.0),
        "up_proj": (2, 2.0),
        "down_proj": (2, 2.0),
    }
    assert lora_modules(model)["layers.self_attn.k_proj"].lora_a.shape == (3, 32, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"gate_proj": 3}}, r"rank_pattern=.*\['gate_proj'\] decide nothing"),
        ({"alpha_pattern": {".*": 3, "q_proj": 4}}, r"alpha_pattern=.*\['q_proj'\] decide nothing"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank=0 is not a positive integer"),
        ({"exclude": ["q_proj", "v_proj"]}, "leaves nothing of the targets"),
        ({"exclude": ["query"]}, r"\['query'\] match no layer"),
    ],
)
def test_bad_patterns_change_nothing(options, message):
    model, _ = decoder()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, 2, 4.0, "qv", rngs=nnx.Rngs(1), **options)
    assert not lora_modules(model)


def test_all_seven_modules_and_stacked_shapes():
    model, _ = decoder()
    inject_lora(model, 2, 4.0, "qkvogud", rngs=nnx.Rngs(1))
    shapes = {name: (m.lora_a.shape, m.lora_b.shape) for name, m in lora_modules(model).items()}
    assert len(shapes) == 7
    assert shapes["layers.self_attn.v_proj"] == ((3, 32, 2), (3, 2, 16))


def test_a_starts_with_variance_one_over_n_in_every_matrix():
    model = nnx.split_rngs(splits=4)(nnx.vmap(lambda rngs: nnx.Sequential(nnx.Linear(400, 10, rngs=rngs))))(nnx.Rngs(0))
    inject_lora(model, 50, 4.0, ["0"], rngs=nnx.Rngs(1))
    (module,) = lora_modules(model).values()
    # 20,000 draws a matrix: the variance's standard error is 1 %.
    np.testing.assert_allclose(module.lora_a[...].var(axis=(1, 2)) * 400, 1.0, atol=0.05)
    assert not np.array_equal(module.lora_a[0], module.lora_a[1])
    assert not module.lora_b[...].any()


@pytest.mark.parametrize("targets", ["qv", ["lm_head"]])
def test_dropout_acts_in_training_only_and_differs_between_calls(targets):
    model, tokens = decoder()
    randomized(inject_lora(model, 2, 64.0, targets, rngs=nnx.Rngs(1), dropout=0.5))
    forward = nnx.jit(lambda m, x: m(x))
    model.train()
    first, second = forward(model, tokens), forward(model, tokens)
    assert not np.array_equal(first, second)
    model.eval()
    np.testing.assert_array_equal(forward(model, tokens), forward(model, tokens))


def test_dropout_differs_between_layers():
    model, _ = decoder()
    inject_lora(model, 2, 64.0, "qv", rngs=nnx.Rngs(1), dropout=0.5)
    keys = jax.random.key_data(lora_modules(model)["layers.self_attn.q_proj"].dropout.rngs.key[...])
    assert len(np.unique(keys, axis=0)) == 3


def test_dropout_leaves_the_frozen_layer_whole():
    model, x = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), jnp.ones((3, 8))
    before = model(x)
    inject_lora(model, 2, 4.0, ["0"], rngs=nnx.Rngs(1), dropout=0.9).train()  # B = 0, so the adapter adds nothing
    np.testing.assert_array_equal(model(x), before)


def test_a_smaller_start():
    (plain, _), (small, _) = decoder(), decoder()
    for model, scale in ((plain, 1.0), (small, 0.25)):
        inject_lora(model, 2, 4.0, "qv", rngs=nnx.Rngs(1), a_scale=scale)
    for ours, theirs in zip(lora_modules(small).values(), lora_modules(plain).values(), strict=True):
        np.testing.assert_array_equal(ours.lora_a[...], 0.25 * theirs.lora_a[...])
        assert not ours.lora_b[...].any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": ["q_proj", "nope"]}, r"LoRA targets \['nope'\] match no layer.*layers.self_attn.q_proj"),
        (
            {"targets": "qz"},
            r"LoRA targets \['qz'\] match no layer.*one of \['qv', 'qkvo', 'qkvogud', 'all-linear'\]",
        ),
        ({"targets": []}, r"LoRA targets \['\(no target\)'\]"),
        ({"rank": 0}, r"rank=0 is not a positive integer"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
    ],
)
def test_errors(kwargs, message):
    model, _ = decoder()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, **{"rank": 2, "alpha": 4.0, "targets": "qv", "rngs": nnx.Rngs(1)} | kwargs)
    assert not lora_modules(model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"rank": 0}, "rank=0"), ({"alpha": 0.0}, "alpha=0.0 is not a positive"), ({"dropout": -0.1}, "dropout=-0.1")],
)
def test_one_layer_checks_its_numbers(kwargs, message):
    linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        LoRALinear(linear, **{"rank": 2, "alpha": 4.0, "rngs": nnx.Rngs(1)} | kwargs)


class Holder(nnx.Module):
    def __init__(self, layers):
        self.layers = layers


def linear(seed=0):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Holder(nnx.data([linear(0), [linear(1)]])),
        lambda: Holder(nnx.data({"a.b": linear(0), "c": {"d": linear(1)}})),
        lambda: Holder(nnx.List([linear(0), nnx.List([linear(1)])])),
        lambda: Holder(nnx.Dict({"a.b": linear(0), "c": linear(1)})),
    ],
)
def test_layers_in_lists_and_under_names_with_dots(make):
    model = inject_lora(make(), 2, 4.0, r".*", rngs=nnx.Rngs(1))
    assert len(lora_modules(model)) == 2
    model = quantize_linears(merge_lora(model), "int8")
    assert all(linear.kernel.dtype == jnp.int8 for linear in adaptable_layers(model).values())


def test_a_layer_in_a_tuple_is_refused_and_nothing_is_changed():
    for change in (
        lambda model: inject_lora(model, 2, 4.0, r".*", rngs=nnx.Rngs(1)),
        lambda model: quantize_linears(model, "int8"),
    ):
        model = nnx.Dict(first=linear(), rest=Holder(nnx.data((linear(),))))
        with pytest.raises(ValueError, match=r"rest\.layers\.0 stands in a tuple.*nnx\.List"):
            change(model)
        assert type(model["first"]) is nnx.Linear


def test_a_layer_that_is_the_model_is_refused():
    for change in (
        lambda model: inject_lora(model, 2, 4.0, r".*", rngs=nnx.Rngs(1)),
        lambda model: quantize_linears(model, "int8"),
    ):
        model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"is itself the Linear to change.*nnx.Sequential\(model\)"):
            change(model)
        assert "" not in vars(model)


@pytest.mark.parametrize("wrap", [nnx.List, nnx.data])
def test_a_layer_of_two_names_is_refused(wrap):
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first, self.free = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
            self.rest = wrap([self.first])

    model = Tied(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"first and rest\.0 are one and the same layer.*nnx.clone"):
        inject_lora(model, 2, 4.0, r".*", rngs=nnx.Rngs(1))
    assert not lora_modules(model)
    inject_lora(model, 2, 4.0, ["free"], rngs=nnx.Rngs(1))
    assert list(lora_modules(model)) == ["free"]


def test_adapters_are_not_stacked_and_nothing_is_not_merged():
    model, _ = decoder()
    with pytest.raises(ValueError, match="no LoRA adapters to merge"):
        merge_lora(model)
    inject_lora(model, 2, 4.0, "qv", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"adapters already, at layers.self_attn.q_proj.*merge_lora"):
        inject_lora(model, 2, 4.0, "qv", rngs=nnx.Rngs(1))


@pytest.mark.parametrize("kind", [None, "int8"])
def test_an_adapted_layer_takes_an_out_sharding_as_linear_does(kind, eight_devices):
    mesh = jax.make_mesh((8,), ("rows",), devices=eight_devices, axis_types=(AxisType.Explicit,))
    linear = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
    layer = LoRALinear(QuantizedLinear(linear, kind) if kind else linear, 2, 4.0, rngs=nnx.Rngs(1))
    layer.lora_b[...] = jnp.ones((2, 4))
    x = jax.random.normal(jax.random.key(0), (8, 64))
    expected = layer(x)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(layer)
        by_row = jax.jit(lambda state, x: nnx.merge(graph, state)(x, out_sharding=P("rows")))
        y = by_row(jax.device_put(state, P()), jax.device_put(x, P(None, "rows")))
    assert jax.typeof(y).sharding.spec == P("rows", None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_orthogonal_start_changes_nothing_and_neither_matrix_is_zero(tied):
    model = tiny.decoder(tie_embeddings=tied)
    before = tiny.call(model, tiny.tokens())
    inject_lora(model, 4, 8.0, "q_proj,down_proj,lm_head", rngs=nnx.Rngs(1), start="orthogonal")
    np.testing.assert_allclose(tiny.call(model, tiny.tokens()), before, atol=1e-5)
    for module in lora_modules(model).values():
        np.testing.assert_allclose(module.lora_a[...] @ module.lora_b[...], 0, atol=1e-6)
        for matrix in (module.lora_a[...], module.lora_b[...]):
            assert jnp.linalg.norm(matrix) ** 2 / matrix.size == pytest.approx(1 / 200, rel=0.4)
    stacked = lora_modules(model)["layers.self_attn.q_proj"].lora_a[...]
    assert not jnp.array_equal(stacked[0], stacked[1])


def test_peft_draws_an_orthogonal_start_of_the_same_size():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(300, 500))
    config = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = {name: p for name, p in peft.get_peft_model(layer, config).state_dict().items() if "lora_" in name}
    model = inject_lora(
        nnx.Sequential(nnx.Linear(300, 500, rngs=nnx.Rngs(0))), 16, 8.0, ["0"], rngs=nnx.Rngs(1), start="orthogonal"
    )
    (ours,) = lora_modules(model).values()
    for mine, matrix in zip((ours.lora_a, ours.lora_b), theirs.values(), strict=True):
        assert mine.shape == tuple(matrix.shape)[::-1]
        assert float(jnp.std(mine[...])) == pytest.approx(float(matrix.std()), rel=0.1)


@pytest.mark.parametrize(("rank", "start", "message"), [(3, "orthogonal", "rank=3 is odd"), (4, "pissa", "is unknown")])
def test_a_start_that_cannot_be_is_refused(rank, start, message):
    model = tiny.decoder()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, rank, 8.0, "qv", rngs=nnx.Rngs(1), start=start)
    assert not lora_modules(model)
