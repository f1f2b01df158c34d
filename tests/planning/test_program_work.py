"""What is read in a program's text, against counts by hand and against XLA's own where it counts in full."""

import jax
import jax.numpy as jnp
import pytest

from stable_lora_jax.planning import lower
from stable_lora_jax.planning.program_work import bytes_moved, product_flops
from stable_lora_jax.planning.work import _trace, dot_flops
from stable_lora_jax.planning.workload import step_shapes
from stable_lora_jax.training import make_mesh
from tests.planning.test_work import WORKLOAD, unread_flops


def text_of(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


@pytest.fixture(scope="module")
def written_out():
    return lower(WORKLOAD, make_mesh(), unroll=True).compile()


def test_a_kernel_reads_its_operands_and_writes_its_results():
    def two_results(a, b, c):
        total = a * b + c
        return total, total[:, 0]

    rows = (1000, 100)
    assert bytes_moved(text_of(lambda a, b, c: a * b + c, rows, rows, rows)) == 4 * 4 * 100_000
    moved = bytes_moved(text_of(two_results, rows, rows, rows))
    assert 4 * (4 * 100_000 + 1000) <= moved <= 4 * (4 * 100_000 + 4 * 1000)


def test_of_a_stack_a_loop_reads_and_writes_a_layer_at_a_time():
    def layers(x, stack):
        return jax.lax.scan(lambda x, layer: (jnp.sin(x + layer), x), x, stack)

    moved = bytes_moved(text_of(layers, (1000,), (64, 1000)))
    # In each of 64 runs: x and a layer read, and the next x and the kept one written; XLA may copy each of them once.
    assert 64 * 4 * 4000 <= moved <= 2.2 * 64 * 4 * 4000


def test_a_steps_bytes_are_xlas_where_that_counts_in_full(written_out):
    assert bytes_moved(written_out.as_text()) == pytest.approx(written_out.cost_analysis()["bytes accessed"], rel=0.01)


def test_a_steps_products_are_those_of_its_trace(written_out):
    traced = dot_flops(_trace(WORKLOAD, step_shapes(WORKLOAD)))
    assert product_flops(lower(WORKLOAD, make_mesh()).compile().as_text()) == traced
    # Less: the first layer's input needs no gradient.
    left = traced - unread_flops()
    assert 0.95 * left < product_flops(written_out.as_text()) < left
