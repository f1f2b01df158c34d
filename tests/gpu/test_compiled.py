"""The real step, compiled for an H100 that is only described: make test-gpu-compile.

XLA may choose other kernels with a real card, where it can try them; memory, buffers, dtypes and counts are the
compiler's all the same.
"""

import functools
import math
import os
import re
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # there is no card to open

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from stable_lora_jax.models import choose_attention
from stable_lora_jax.models.attention import attend
from stable_lora_jax.models.chunked_head import CHUNK_BYTES
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Workload, lower, parse_topology, plan_step, topology_devices
from stable_lora_jax.planning.program_work import attention_flops, bytes_moved, product_flops
from stable_lora_jax.planning.workload import step_shapes
from stable_lora_jax.training import (
    SweepPoint,
    compile_step,
    compile_sweep_step,
    init_state,
    make_mesh,
    make_optimizer,
    suits_unrolling,
)

LLAMA = KNOWN_CONFIGS["llama-3.2-1b"]
H100 = parse_topology("h100:1")


@functools.cache
def h100() -> jax.Device:
    return topology_devices(H100)[0]


@functools.cache
def compiled(
    rows: int,
    length: int,
    targets: int = 128,
    method: str = "stable-lora",
    attention: str = "auto",
    layers: int = 16,
    *,
    unroll: bool = True,
    cublas: bool = False,
):
    chosen = choose_attention(attention, dtype=jnp.bfloat16, head_dim=LLAMA.head_dim, device=h100())
    work = Workload(config=LLAMA, rows=rows, length=length, num_targets=targets, method=method, attention=chosen)
    mesh = make_mesh(devices=[h100()])
    assert suits_unrolling(mesh)
    # Without a card to try them on, XLA takes its own kernels for all products; with one, cuBLAS's where these win.
    options: Any = {"xla_gpu_enable_triton_gemm": False} if cublas else None
    return lower(work.shallow(layers), mesh, unroll=unroll).compile(compiler_options=options)


def temporaries(program) -> float:
    """Returns gigabytes next to the arguments."""
    return program.memory_analysis().temp_size_in_bytes / 1e9


def shapes(program) -> set[tuple[str, tuple[int, ...]]]:
    """Returns (dtype, sizes) of every array in a compiled program."""
    return arrays(program.as_text())


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Returns (dtype, sizes) of every array in a program's text."""
    found = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return {(dtype, tuple(map(int, sizes.split(",")))) for dtype, sizes in found}


def test_the_device_has_fused_attention():
    assert choose_attention("auto", dtype=jnp.bfloat16, head_dim=64, device=h100()) == "cudnn"
    assert choose_attention("auto", dtype=jnp.float32, head_dim=64, device=h100()) == "xla"
    with pytest.raises(ValueError, match=r"'cudnn' does not work here: the computation is in float32"):
        choose_attention("cudnn", dtype=jnp.float32, head_dim=64, device=h100())
    with pytest.raises(ValueError, match=r"heads have 256 features, and cuDNN takes multiples of 8 up to 128"):
        choose_attention("cudnn", dtype=jnp.bfloat16, head_dim=256, device=h100())


@pytest.mark.parametrize(
    ("rows", "length", "targets", "most"),
    [(8, 1024, 128, 8.0), (8, 1024, 1024, 8.0), (4, 4096, 128, 16.0), (4, 4096, 4096, 16.0), (1, 16384, 128, 16.0)],
)
def test_memory_grows_with_the_length_and_no_scores_are_left(rows, length, targets, most):
    program = compiled(rows, length, targets)
    assert "__cudnn$fmha" in program.as_text()
    assert temporaries(program) <= most
    assert not [sizes for _, sizes in shapes(program) if sizes.count(length) > 1]
    logits = [sizes for _, sizes in shapes(program) if LLAMA.vocab_size in sizes and LLAMA.hidden_size not in sizes]
    assert max(map(math.prod, logits)) * 4 <= CHUNK_BYTES


def test_scores_would_be_seen():
    # So that the test above can fail.
    inputs = jax.ShapeDtypeStruct((8, 1024, 64), jnp.bfloat16, sharding=SingleDeviceSharding(h100()))
    program = jax.jit(lambda x: jax.nn.softmax(x @ x.mT) @ x).lower(inputs).compile()
    assert [sizes for _, sizes in shapes(program) if sizes.count(1024) > 1]


def test_written_out_too_only_a_block_of_scores_is_in_memory():
    assert temporaries(compiled(8, 1024, attention="xla", layers=2)) <= 2.5


@pytest.mark.parametrize(("unroll", "cublas"), [(True, True), (True, False), (False, False)])
def test_nothing_but_the_elementwise_is_computed_twice(unroll, cublas):
    # With cuBLAS and jax 0.11, a loop over layers does: XLA computes a product once more to write it to the stack of
    # what the backward pass reads. That is why layers are written out.
    rows, length, targets = 8, 1024, 128
    program = compiled(rows, length, targets, layers=4, unroll=unroll, cublas=cublas)
    text, config = program.as_text(), LLAMA
    width, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    before, after = width * (width + 2 * kv), width * (width + 3 * config.intermediate_size)  # attention, in a layer
    adapters = 4 * 8 * (3 * width + kv)  # q: (n, r) and (r, n), v: (n, r) and (r, kv)
    # Written out, what follows the last layer's attention is computed for the predicted tokens alone.
    everywhere, read = (4 * before + 3 * after, after) if unroll else (4 * (before + after), 0)
    forward_and_back = 2 * 2 * rows * (length * everywhere + targets * (read + config.vocab_size * width))
    once = forward_and_back + 3 * 2 * rows * length * adapters
    assert 0.97 * once <= product_flops(text) <= 1.001 * once  # less: the first layer's x needs no gradient
    scores = 8 * config.num_heads * length**2 // 2  # causal
    assert attention_flops(text) == 4 * (2 + 5) * 2 * scores * config.head_dim
    kernels = text.count('custom_call_target="__cudnn$fmhaSoftmax"'), text.count("__cudnn$fmhaSoftmaxBackward")
    assert kernels == ((4, 4) if unroll else (1, 1))


def test_packed_rows_take_a_mask_and_half_of_the_scores():
    rows, length, layers = 8, 1024, 2
    workload = Workload(config=LLAMA, rows=rows, length=length, num_targets=128, attention="cudnn").shallow(layers)
    graph, loss, optimizer, state, frozen, batch = step_shapes(workload)
    batch = batch._replace(answer=jax.ShapeDtypeStruct((rows, 8), jnp.int32))
    step: Any = compile_step(graph, loss, optimizer, mesh=make_mesh(devices=[h100()]), frozen=frozen, unroll=True)
    program = step.lower(state, frozen, batch).compile()
    assert "ScaleBias" in program.as_text()
    scores = rows * LLAMA.num_heads * length**2 // 2  # the mask hides more, but the kernels know that it is causal
    assert attention_flops(program.as_text()) == layers * (2 + 5) * 2 * scores * LLAMA.head_dim
    masks = [sizes for _, sizes in shapes(program) if sizes.count(length) > 1]
    assert max(map(math.prod, masks)) == rows * length**2


@pytest.mark.parametrize(("length", "masked", "kernel"), [(255, False, False), (255, True, False), (256, True, True)])
def test_rows_of_odd_length_are_written_out(length, masked, kernel):
    def shaped(*sizes, dtype: Any = jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(h100()))

    def loss(query, key, visible):
        return attend(query, key, key, visible, "cudnn").sum(dtype=jnp.float32)

    visible = shaped(2, length, length, dtype=bool) if masked else None
    arguments = shaped(2, length, 9, 64), shaped(2, length, 3, 64), visible
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    assert ("__cudnn$fmha" in text) == kernel


def test_a_sweep_of_packed_rows_compiles():
    adapters = 3
    workload = Workload(config=LLAMA, rows=2, length=256, num_targets=32, attention="cudnn").shallow(2)
    graph, loss, _, state, frozen, batch = step_shapes(workload)
    batch = batch._replace(answer=jax.ShapeDtypeStruct((2, 8), jnp.int32))

    def optimizer(point: SweepPoint):
        return make_optimizer("stable-lora", point.learning_rate, lam=point.lam, weight_decay=0.0, clip_norm=1.0)

    def stacked(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((adapters, *leaf.shape), leaf.dtype), tree)

    start = jax.vmap(lambda adapters: init_state(adapters, optimizer(SweepPoint(5e-4, 2.0))))
    numbers = stacked(SweepPoint(*[jax.ShapeDtypeStruct((), jnp.float32)] * len(SweepPoint._fields)))
    step: Any = compile_sweep_step(graph, loss, optimizer, mesh=make_mesh(devices=[h100()]))
    program = step.lower(jax.eval_shape(start, stacked(state.adapters)), numbers, frozen, stacked(batch)).compile()
    assert product_flops(program.as_text()) > adapters * 0.9 * product_flops(compiled(2, 256, 32, layers=2).as_text())


def test_layers_are_looped_over_where_gpus_share_weights():
    devices = topology_devices(parse_topology("h100:8"))
    assert suits_unrolling(make_mesh(data=8, devices=devices))
    assert not suits_unrolling(make_mesh(fsdp=8, devices=devices))


def test_the_loop_over_chunks_of_logits_carries_no_more_numbers_of_tokens_than_there_are():
    loops = "\n".join(line for line in compiled(8, 1024).as_text().splitlines() if " while(" in line)
    numbers = [sizes for dtype, sizes in arrays(loops) if dtype == "s32"]
    assert max(map(math.prod, numbers)) == LLAMA.vocab_size


def test_layers_written_out_copy_nothing_into_stacks():
    looped, out = (compiled(8, 1024, layers=4, unroll=unroll) for unroll in (False, True))
    assert bytes_moved(out.as_text()) < 0.9 * bytes_moved(looped.as_text())
    stacks = [{sizes for dtype, sizes in shapes(each) if sizes[:3] == (4, 8, 1024)} for each in (looped, out)]
    assert stacks[0]
    assert not stacks[1]


def test_frozen_weights_are_multiplied_in_bfloat16():
    text = compiled(8, 1024).as_text()
    wide = re.findall(r"f32\[(?:2048,8192|8192,2048|2048,2048|2048,512)\]", text)
    assert not wide, set(wide)


def test_the_shrink_takes_no_memory():
    # A described card has no cost analysis; what the shrink costs in FLOPs and bytes is counted for TPUs (tests/tpu).
    adamw, ours = (temporaries(compiled(8, 1024, method=method, layers=2)) for method in ("adamw", "stable-lora"))
    assert ours <= 1.001 * adamw


@pytest.mark.parametrize("name", ["h100:1", "h200:1", "a100:1", "h100:8"])
def test_a_plan(name):
    topology = parse_topology(name)
    workload = Workload(config=LLAMA, rows=8, length=1024, num_targets=1024).shallow(2)
    plan = plan_step(workload, topology, {"data": topology.chips}, use_compiler=True)
    assert plan.source == "compiled"
    assert plan.fits
    assert plan.workload.attention == "cudnn"
    assert bool(plan.exchanges) == (topology.chips > 1)
    estimate = plan_step(workload, topology, {"data": topology.chips}, use_compiler=False)
    assert plan.memory == pytest.approx(estimate.memory, rel=0.35)
    assert plan.work.flops == pytest.approx(estimate.work.flops, rel=0.05)
    assert estimate.work.bytes_accessed < plan.work.bytes_accessed < 4 * estimate.work.bytes_accessed
