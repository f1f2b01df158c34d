"""The real step, compiled for an H100 that is only described: make test-gpu-compile.

XLA may choose other kernels beside a real card, where it can try them; memory, buffers, dtypes and counts are the
compiler's all the same.
"""

import functools
import os
import re
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # there is no card to open

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from stable_lora_jax.models import choose_attention
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Workload, lower
from stable_lora_jax.training import make_mesh

LLAMA = KNOWN_CONFIGS["llama-3.2-1b"]
# NVIDIA H100 80GB HBM3: compute capability 9.0, 132 multiprocessors, 3.35 TB/s, cuDNN 9.12, CUDA 13.0.
TARGET = Path(__file__).with_name("h100.txtpb").read_text()


@functools.cache
def h100() -> jax.Device:
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=TARGET
    )
    return described.devices[0]


@functools.cache
def compiled(rows: int, length: int, method: str = "stable-lora", attention: str = "auto", layers: int = 16):
    chosen = choose_attention(attention, dtype=jnp.bfloat16, head_dim=LLAMA.head_dim, device=h100())
    work = Workload(config=LLAMA, rows=rows, length=length, num_targets=128, method=method, attention=chosen)
    return lower(work.shallow(layers), make_mesh(devices=[h100()])).compile()


def temporaries(program) -> float:
    """Returns gigabytes beside the arguments."""
    return program.memory_analysis().temp_size_in_bytes / 1e9


def shapes(program) -> set[tuple[str, tuple[int, ...]]]:
    """Returns (dtype, sizes) of every array in a compiled program."""
    found = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text())
    return {(dtype, tuple(map(int, sizes.split(",")))) for dtype, sizes in found}


def test_the_device_has_fused_attention():
    assert choose_attention("auto", dtype=jnp.bfloat16, head_dim=64, device=h100()) == "cudnn"
    assert choose_attention("auto", dtype=jnp.float32, head_dim=64, device=h100()) == "xla"
    with pytest.raises(ValueError, match=r"'cudnn' does not work here: the computation is in float32"):
        choose_attention("cudnn", dtype=jnp.float32, head_dim=64, device=h100())
    with pytest.raises(ValueError, match=r"heads have 256 features, and cuDNN takes multiples of 8 up to 128"):
        choose_attention("cudnn", dtype=jnp.bfloat16, head_dim=256, device=h100())


@pytest.mark.parametrize(("rows", "length", "most"), [(8, 1024, 8.0), (4, 4096, 16.0), (1, 16384, 16.0)])
def test_memory_grows_with_the_length_and_no_scores_are_left(rows, length, most):
    program = compiled(rows, length)
    assert "__cudnn$fmha" in program.as_text()
    assert temporaries(program) <= most
    assert not [sizes for _, sizes in shapes(program) if sizes.count(length) > 1]


def test_written_out_the_scores_are_there():
    # So that the test above can fail.
    program = compiled(8, 1024, attention="xla", layers=2)
    assert [sizes for _, sizes in shapes(program) if sizes.count(1024) > 1]


def test_frozen_weights_are_multiplied_in_bfloat16():
    text = compiled(8, 1024).as_text()
    wide = re.findall(r"f32\[(?:2048,8192|8192,2048|2048,2048|2048,512)\]", text)
    assert not wide, set(wide)


def test_the_shrink_takes_no_memory():
    # A described card has no cost analysis; what the shrink costs in FLOPs and bytes is counted for TPUs (tests/tpu).
    adamw, ours = (temporaries(compiled(8, 1024, method, layers=2)) for method in ("adamw", "stable-lora"))
    assert ours <= 1.001 * adamw
