"""Quantized base weights: the right values, the same function, and no float copy while training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from stable_lora_jax.data import make_batch, right_branch_only
from stable_lora_jax.lora import QuantizedLinear, inject_lora, lora_modules, merge_lora, quantize_linears
from stable_lora_jax.lora.injection import adaptable_layers
from stable_lora_jax.training import compile_step, init_state, make_loss, make_mesh, make_optimizer, split_model
from stable_lora_jax.training.step import place
from tests.models import tiny
from tests.training.tiny_runs import VOCAB, questions, trees_equal

LEVELS = {
    "int8": np.arange(-128, 128),
    # The quantiles of a normal distribution that 4 bits tell apart: QLoRA (arXiv 2305.14314), appendix E.
    "nf4": np.array([
        -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
    ]),
}  # fmt: skip


def read_back(linear, kind):
    """What a layer holds, as kernels in float64, shape (..., n, m), and the scale of each entry."""
    value, scale = np.int64(linear.kernel[...]), np.float64(linear.scale[...])
    scale = np.repeat(scale, value.shape[-2] // scale.shape[-2], axis=-2)
    return scale * LEVELS[kind][value + (128 if kind == "int8" else 0)], scale


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_every_weight_is_the_nearest_there_is_and_the_layer_multiplies_by_it(kind):
    linear = nnx.Linear(128, 24, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    quantized, x = QuantizedLinear(linear, kind), jax.random.normal(jax.random.key(0), (5, 128))
    kernel, (read, scale) = np.float64(linear.kernel[...]), read_back(quantized, kind)
    blocks = kernel if kind == "int8" else kernel.reshape(2, 64, 24)
    largest = np.abs(blocks).max(axis=-2, keepdims=True) / (127.5 if kind == "int8" else 1)
    np.testing.assert_allclose(scale, np.broadcast_to(largest, blocks.shape).reshape(128, 24), rtol=1e-6)
    distances = np.abs(scale[..., None] * LEVELS[kind] - kernel[..., None])
    np.testing.assert_allclose(np.abs(read - kernel), distances.min(axis=-1), atol=1e-7)
    # Float32 sums of 128.
    np.testing.assert_allclose(quantized(x), np.float64(x) @ read + np.float64(linear.bias[...]), atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_scanned_decoder_is_the_one_with_the_kernels_read_back(kind):
    model, reference = quantize_linears(tiny.decoder(), kind), tiny.decoder()
    for path, linear in adaptable_layers(model.layers).items():
        adaptable_layers(reference.layers)[path].kernel[...] = jnp.asarray(read_back(linear, kind)[0], jnp.float32)
    # The same kernels up to float32's rounding of a scale times a level.
    np.testing.assert_allclose(tiny.call(model, tiny.tokens()), tiny.call(reference, tiny.tokens()), atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_moves_adapters_alone_and_holds_no_float_copy(kind):
    model = tiny.decoder(vocab_size=VOCAB, hidden_size=256, intermediate_size=256, num_layers=7)
    inject_lora(quantize_linears(model, kind), 2, 4.0, "qv", rngs=nnx.Rngs(1))
    graph, adapters, frozen = split_model(model)
    optimizer = make_optimizer("stable-lora", 1e-2, lam=0.05, ratio=4.0, weight_decay=0.0, clip_norm=1.0)
    batch = make_batch([right_branch_only(question) for question in questions(2)], width=20)
    state, mesh = init_state(adapters, optimizer), make_mesh()
    step = compile_step(graph, make_loss("answer", 1), optimizer, mesh=mesh, frozen=frozen)
    compiled = step.lower(state, frozen, batch).compile()
    # Activations take 0.75 of the float kernels' bytes here, and XLA unpacks 4 bits to 8 on a CPU.
    kernels = 7 * 3 * 256 * 256 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * kernels
    before, losses = jax.tree.map(np.asarray, frozen), []
    for _ in range(3):
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[2] < losses[1] < losses[0]
    assert trees_equal(before, frozen)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_mesh_splits_values_as_kernels_and_scales_where_there_are_enough(kind):
    model = tiny.decoder(vocab_size=VOCAB, hidden_size=256, intermediate_size=256)
    inject_lora(quantize_linears(model, kind), 2, 4.0, "qv", rngs=nnx.Rngs(1))
    graph, adapters, frozen = split_model(model)
    layers = place(mesh := make_mesh(fsdp=2, tensor=2), frozen).params["layers"]
    query, down = layers["self_attn"]["q_proj"]["base"], layers["mlp"]["down_proj"]
    assert query["kernel"].spec == P(None, "fsdp", "tensor")
    assert down["kernel"].spec == P(None, "tensor", "fsdp")
    # int8 has one block of rows, nf4 here four.
    assert query["scale"].spec == (P(None, None, "tensor") if kind == "int8" else P(None, "fsdp", "tensor"))
    assert down["scale"].spec == (P(None, None, "fsdp") if kind == "int8" else P(None, "tensor", "fsdp"))
    optimizer = make_optimizer("stable-lora", 1e-2, lam=0.05, ratio=4.0, weight_decay=0.0, clip_norm=1.0)
    batch = make_batch([right_branch_only(question) for question in questions(2)], width=20)
    norms = []
    for devices in (make_mesh(), mesh):
        state, shared = init_state(adapters, optimizer), jax.device_put(frozen, place(devices, frozen))
        step = compile_step(graph, make_loss("answer", 1), optimizer, mesh=devices, frozen=shared)
        metrics = step(jax.tree.map(jnp.copy, state), shared, batch)[1]
        norms.append([float(metrics.loss), float(metrics.grad_norm)])
    np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("inputs", [jnp.int32, jnp.bfloat16])
def test_a_layer_without_a_dtype_computes_in_that_of_its_kernel(kind, inputs):
    linear, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((1, 8), inputs)
    found = QuantizedLinear(linear, kind)(x)
    assert found.dtype == linear(x).dtype == jnp.float32
    np.testing.assert_allclose(found, linear(x), atol=0.5)  # of rounding to 4 bits; entries are of order 1


def test_merging_is_refused():
    model = inject_lora(quantize_linears(tiny.decoder(), "int8"), 2, 4.0, "qv", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"quantized at layers\.self_attn\.q_proj, .*without quantizing"):
        merge_lora(model)
    assert len(lora_modules(model)) == 2


class Doubling(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def tied():
    linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    return nnx.Dict(a=linear, b=linear)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda model: model, "int3", r"quantize='int3' is unknown. Known: int8, nf4"),
        (lambda model: quantize_linears(model, "int8"), "int8", r"already, at layers\.mlp\.down_proj, .*without"),
        (
            lambda model: inject_lora(model, 2, 4.0, ["k_proj"], rngs=nnx.Rngs(0)), "nf4",
            r"has LoRA adapters, at layers\.self_attn\.k_proj\. Quantize the base model",
        ),
        (
            lambda _: nnx.Sequential(nnx.LoRALinear(8, 4, lora_rank=2, rngs=nnx.Rngs(0))), "int8",
            r"has LoRA adapters, at layers\.0\.lora\. Quantize the base model",
        ),
        (lambda _: nnx.Sequential(Doubling(8, 4, rngs=nnx.Rngs(0))), "int8", r"layers layers\.0 are of a subclass"),
        (
            lambda _: nnx.Sequential(nnx.Linear(8, 4, dot_general=jax.lax.batch_matmul, rngs=nnx.Rngs(0))), "int8",
            r"layers layers\.0 are of a subclass of nnx\.Linear or have a dot_general of their own",
        ),
        (lambda _: tied(), "nf4", r"a and b are one and the same layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused_and_left_alone(change, kind, message):
    model = change(tiny.decoder())
    before = jax.tree.map(np.asarray, nnx.state(model))
    with pytest.raises(ValueError, match=message):
        quantize_linears(model, kind)
    assert trees_equal(before, nnx.state(model))
