"""Compiled for TPUs, the real step's memory grows with the length of its rows, not with the square of it."""

import functools
import re

import jax.numpy as jnp
import pytest

from stable_lora_jax.models import choose_attention
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Workload, lower, parse_topology, topology_devices
from stable_lora_jax.training import make_mesh

LLAMA = KNOWN_CONFIGS["llama-3.2-1b"]


@functools.cache
def devices():
    return topology_devices(parse_topology("v5e:2x2"))


@functools.cache
def compiled(rows: int, length: int, attention: str = "splash", layers: int = 16, **sizes: int):
    work = Workload(config=LLAMA, rows=rows, length=length, num_targets=128, attention=attention, remat=True)
    return lower(work.shallow(layers), make_mesh(**sizes, devices=devices())).compile()


def squares(program, length: int) -> list[tuple[int, ...]]:
    """Returns the sizes of all arrays that have two axes of a row's length."""
    found = (tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", program.as_text()))
    return [sizes for sizes in found if sizes.count(length) > 1]


def test_a_tpu_attends_by_the_kernel():
    assert choose_attention("auto", dtype=jnp.bfloat16, head_dim=64, device=devices()[0]) == "splash"
    assert choose_attention("xla", dtype=jnp.bfloat16, head_dim=64, device=devices()[0]) == "xla"


@pytest.mark.parametrize(("rows", "length"), [(4, 4096), (1, 16384)])
def test_no_scores_are_left_and_a_longer_row_takes_no_more_than_as_many_tokens(rows, length):
    program, shorter = compiled(rows, length), compiled(16, 1024)
    assert "tpu_custom_call" in program.as_text()
    assert not squares(program, length)
    memory, others = (each.memory_analysis().temp_size_in_bytes for each in (program, shorter))
    assert memory <= 1.1 * others


def test_scores_would_be_seen():
    assert squares(compiled(4, 4096, "xla", layers=2), 4096)


def test_a_mesh_splits_rows_and_heads():
    program = compiled(4, 4096, layers=2, fsdp=2, tensor=2)
    # 32 query heads of 64 features, padded to the chip's 128: half of the rows and of the heads on a chip.
    assert re.search(r"\[2,16,4096,(64|128)\]", program.as_text())
    assert not re.search(r"\[(4,32|2,32|4,16),4096,(64|128)\]", program.as_text())
