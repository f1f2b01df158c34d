"""The real step compiles for TPU slices, fits, gathers a layer at a time, and the shrink costs next to nothing.

Needs libtpu and no TPU: `make test-tpu`. Not collected by a plain run of the tests.
"""

from dataclasses import replace

import pytest

from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import (
    Workload,
    compiled_work,
    estimated_work,
    parse_topology,
    plan_step,
    topology_devices,
)
from stable_lora_jax.planning.work import abstract_mesh
from stable_lora_jax.training import make_mesh

CASES = [
    ("llama-3.2-1b", "v5e:4x4", {"fsdp": 16}),
    ("qwen2-0.5b", "v5e:4x4", {"data": 2, "fsdp": 8}),
    ("llama-3.2-1b", "v5p:2x2x2", {"fsdp": 4, "tensor": 2}),
    ("qwen2-0.5b", "v5p:2x2x2", {"fsdp": 8}),
]


def workload(model, method="stable-lora"):
    return Workload(config=KNOWN_CONFIGS[model], rows=32, length=512, num_targets=64, method=method, remat=True)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    """The case, and its Stable-LoRA step compiled."""
    model, topology, sizes = request.param
    topology = parse_topology(topology)
    return model, topology, sizes, plan_step(workload(model), topology, sizes, use_compiler=True)


def test_it_fits(case):
    _, topology, _, plan = case
    assert plan.source == "compiled"
    assert plan.fits
    assert plan.memory < topology.chip.hbm


def test_the_shrink_costs_next_to_nothing(case):
    model, topology, sizes, plan = case
    adamw = compiled_work(workload(model, "adamw"), make_mesh(**sizes, devices=topology_devices(topology)))
    assert 1 <= plan.work.flops / adamw.flops <= 1.001
    assert plan.work.bytes_accessed / adamw.bytes_accessed <= 1.001


def test_weights_are_gathered_a_layer_at_a_time(case):
    model, _, sizes, plan = case
    config = KNOWN_CONFIGS[model]
    largest = 2 * config.hidden_size * config.intermediate_size // sizes.get("tensor", 1)
    gathers = [each for each in plan.work.collectives if each.kind == "all-gather" and each.result_bytes >= largest]
    in_layers = [each for each in gathers if each.in_loop]
    assert in_layers
    assert max(each.result_bytes for each in in_layers) <= largest
    assert all(each.runs % config.num_layers == 0 for each in in_layers)
    # Outside the layers only the embedding is gathered.
    embedding = 2 * config.vocab_size * config.hidden_size // sizes.get("tensor", 1)
    assert all(each.result_bytes <= embedding for each in gathers)


def test_the_estimate_is_near(case):
    model, _, sizes, plan = case
    full = {axis: sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    estimate = estimated_work(workload(model), abstract_mesh(**full))
    assert estimate.flops == pytest.approx(plan.work.flops, rel=0.25)
    assert plan.work.arguments == pytest.approx(estimate.arguments, rel=0.1)
    assert 0.3 < estimate.memory / plan.work.memory < 3


def test_too_large_a_step_is_refused_with_the_compilers_figure():
    large = replace(workload("llama-3.2-1b"), rows=256, length=2048, num_targets=2048, remat=False)
    plan = plan_step(large, parse_topology("v5e:2x2"), {"fsdp": 4}, use_compiler=True)
    assert not plan.fits
    assert plan.memory > parse_topology("v5e:2x2").chip.hbm
    assert any("--remat" in change for change in plan.advice())


def test_a_slice_that_is_not_offered():
    with pytest.raises(ValueError, match=r"libtpu has no slice v5e:3x5"):
        topology_devices(parse_topology("v5e:3x5"))
