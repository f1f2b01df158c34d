"""Meshes: what they refuse, and that a step over fsdp gathers one layer's weights at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from stable_lora_jax.models import Decoder
from stable_lora_jax.planning import Workload, lower, read_collectives
from stable_lora_jax.training import make_mesh
from stable_lora_jax.training.sharding import check_decoder, frozen_shardings
from tests.models import tiny


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((1, 1, 4), r"tensor=4 does not divide the model's num_heads=6.*Choose tensor among 1, 2,"),
        ((1, 1, 3), r"tensor=3 does not divide the model's num_kv_heads=2"),
        ((1, 5, 1), r"fsdp=5 does not divide the 24 of embed_tokens.embedding"),
        ((1, 1, 2), r"tensor=2 does not divide the 61 of embed_tokens.embedding"),
    ],
)
def test_a_mesh_must_divide_heads_and_widths(sizes, told):
    decoder = nnx.eval_shape(lambda: Decoder(tiny.CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=told):
        check_decoder(make_mesh(*sizes), decoder)


def test_a_mesh_that_divides_is_accepted():
    decoder = nnx.eval_shape(lambda: Decoder(tiny.config(vocab_size=64), rngs=nnx.Rngs(0)))
    check_decoder(make_mesh(2, 2, 2), decoder)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_output_layer_is_split_with_and_without_an_adapter(adapted):
    layer = {"kernel": jax.ShapeDtypeStruct((24, 64), jnp.float32)}
    state = nnx.State({"lm_head": {"base": layer} if adapted else layer})
    (sharding,) = jax.tree.leaves(frozen_shardings(make_mesh(1, 2, 2), state))
    assert sharding.spec == PartitionSpec("fsdp", "tensor")


def test_a_mesh_over_given_devices(eight_devices):
    mesh = make_mesh(2, 2, devices=eight_devices[4:])
    assert mesh.devices.flatten().tolist() == eight_devices[4:]
    with pytest.raises(ValueError, match="needs 8 devices; there are 4"):
        make_mesh(8, devices=eight_devices[4:])


# Wide layers and few tokens, so that memory is weights.
CONFIG = replace(tiny.CONFIG, vocab_size=64, hidden_size=256, intermediate_size=512, num_layers=12)
LAYER = 4 * (2 * 256 * 24 + 2 * 256 * 8 + 3 * 256 * 512)
LARGEST = 4 * 256 * 512


@pytest.mark.parametrize(("sizes", "remat"), [((1, 8, 1), False), ((2, 4, 1), True), ((1, 4, 2), False)])
def test_fsdp_gathers_one_layer_at_a_time(sizes, remat):
    workload = Workload(config=CONFIG, rows=8, length=4, num_targets=4, dtype=jnp.float32, remat=remat)
    compiled = lower(workload, make_mesh(*sizes)).compile()
    gathers = [each for each in read_collectives(compiled.as_text(), 8) if each.kind == "all-gather"]
    weights = [each for each in gathers if each.result_bytes >= LARGEST // sizes[2]]
    assert weights, "no weight is gathered whole"
    assert all(each.in_loop and each.runs == 12 for each in weights)
    assert max(each.result_bytes for each in weights) == LARGEST // sizes[2]
    # Beside one layer the program may copy the part of the stack that a device holds anyway.
    _, fsdp, tensor = sizes
    allowed = 12 * LAYER // (fsdp * tensor) + 3 * LAYER
    assert compiled.memory_analysis().temp_size_in_bytes < allowed < 12 * LAYER // tensor
