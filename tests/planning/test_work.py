"""One chip's work: the compiled program's, checked on devices that are there, and the estimate beside it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from stable_lora_jax.planning import Workload, compiled_work, estimated_work, lower
from stable_lora_jax.planning.work import abstract_mesh, dot_flops, kernel_flops
from stable_lora_jax.training import make_mesh
from tests.models import tiny

WORKLOAD = Workload(
    config=tiny.config(vocab_size=64, num_layers=4), rows=8, length=16, num_targets=8, dtype=jnp.float32, rank=3
)


def unread_flops() -> int:
    """What a loop does more than layers written out: the last one's end, where nothing is predicted from."""
    c, unread = WORKLOAD.config, WORKLOAD.rows * (WORKLOAD.length - WORKLOAD.num_targets)
    return 2 * 2 * unread * c.hidden_size * (c.num_heads * c.head_dim + 3 * c.intermediate_size)


@pytest.fixture(scope="module")
def compiled():
    return compiled_work(WORKLOAD, make_mesh())


def test_flops_grow_by_a_layer_as_written_out(compiled):
    """Extrapolated from one and two layers, against all layers written out; XLA counts the latter in full."""
    left_out = unread_flops()
    whole = lower(WORKLOAD, make_mesh(), unroll=True).compile().cost_analysis()["flops"]
    assert compiled.flops - left_out == pytest.approx(whole, rel=0.01)
    assert left_out > 0.05 * whole
    assert lower(WORKLOAD, make_mesh()).compile().cost_analysis()["flops"] < 0.7 * whole  # why all this is necessary


def test_parts_do_the_work_of_the_whole(compiled):
    parts = compiled_work(replace(WORKLOAD, accumulate=2), make_mesh())
    assert parts.flops == pytest.approx(compiled.flops, rel=0.05)  # the optimizer is counted with each part


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_kernels_flops_are_those_of_attention_in_blocks(accumulate):
    config = replace(WORKLOAD.config, max_positions=256)
    workload = replace(WORKLOAD, config=config, length=200, attention="splash", accumulate=accumulate)
    blocks = [(64, 64), (64, 128), (64, 192), (8, 200)]  # queries, keys up to their end
    scores = sum(queries * keys for queries, keys in blocks)
    # Two products forward, and the scores again and four more backward; the sums over dO O of 256 tokens XLA does.
    one_layer = 2 * workload.rows * config.num_heads * config.head_dim * ((2 + 5) * scores - 256)
    assert kernel_flops(workload) == config.num_layers * one_layer
    assert kernel_flops(replace(workload, attention="xla")) == 0


def test_what_is_computed_again_is_counted():
    def flops(remat):
        workload = replace(WORKLOAD.shallow(1), remat=remat)
        return lower(workload, make_mesh(), unroll=True).compile().cost_analysis()["flops"]

    assert flops(True) > 1.1 * flops(False)


def test_an_adapters_products_are_computed_once_forward_and_twice_back():
    one, two = (estimated_work(replace(WORKLOAD, rank=rank), abstract_mesh(1, 1, 1)).flops for rank in (1, 2))
    c = WORKLOAD.config
    fans = 2 * c.hidden_size + (c.num_heads + c.num_kv_heads) * c.head_dim  # of q and v, in and out
    assert two - one == 3 * 2 * WORKLOAD.tokens * c.num_layers * fans


def test_adapters_add_little_to_what_the_backward_pass_keeps():
    def temporaries(targets):
        deep = tiny.config(vocab_size=64, num_layers=64)
        workload = replace(WORKLOAD, config=deep, rows=2, length=64, targets=targets)
        return lower(workload, make_mesh()).compile().memory_analysis().temp_size_in_bytes

    # One array a projection, adapted or not. More is what attention gives, where an adapter of o_proj reads it.
    assert temporaries("qkvogud") < 1.25 * temporaries("qv")


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_the_estimate_knows_what_lies_between_steps(sizes):
    memory = lower(WORKLOAD, make_mesh(*sizes)).compile().memory_analysis()
    # The answers' numbers, segments, documents and owners, for which this loss, of one answer per row, has no use.
    unread = 4 * WORKLOAD.rows * (1 + 2 * WORKLOAD.length + WORKLOAD.num_targets) // (sizes[0] * sizes[1])
    estimate = estimated_work(WORKLOAD, abstract_mesh(*sizes))
    assert estimate.arguments == memory.argument_size_in_bytes + unread


def test_the_estimate_counts_the_matrix_products(compiled):
    estimate = estimated_work(WORKLOAD, abstract_mesh(1, 1, 1))
    assert 0.6 < estimate.flops / compiled.flops < 1  # XLA also counts what is no product


def test_flops_of_a_product_and_a_loop():
    def program(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    shapes = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((7, 5, 5), jnp.float32)
    assert dot_flops(jax.make_jaxpr(program)(*shapes).jaxpr) == 7 * 2 * 3 * 5 * 5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": 0}, "rows=0 is below 1"),
        ({"accumulate": 3}, "8 rows does not split into accumulate=3"),
        ({"length": 65}, "length=65 is more than the model's context of 64"),
    ],
)
def test_errors(change, told):
    with pytest.raises(ValueError, match=told):
        replace(WORKLOAD, **change)
