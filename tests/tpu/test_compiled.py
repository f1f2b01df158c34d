"""The real step compiles for TPU slices, fits, gathers a layer at a time, and the shrink costs next to nothing.

Needs libtpu and no TPU: `make test-tpu`. Not collected by a plain run of the tests.
"""

from dataclasses import replace

import pytest

from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import (
    Workload,
    estimated_work,
    lower,
    parse_topology,
    plan_step,
    read_collectives,
    topology_devices,
)
from stable_lora_jax.planning.work import abstract_mesh
from stable_lora_jax.training import make_mesh

METHODS = ("stable-lora", "adamw")
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
    """The case, and its step compiled with Stable-LoRA and with AdamW."""
    model, name, sizes = request.param
    topology = parse_topology(name)
    mesh = make_mesh(**sizes, devices=topology_devices(topology))
    return model, topology, sizes, [lower(workload(model, method), mesh).compile() for method in METHODS]


def test_it_fits(case):
    model, topology, sizes, (compiled, _) = case
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < topology.chip.hbm
    full = {axis: sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    estimate = estimated_work(workload(model), abstract_mesh(**full))
    assert memory.argument_size_in_bytes == pytest.approx(estimate.arguments, rel=0.1)


def test_the_shrink_costs_next_to_nothing(case):
    """The loop over layers counts once here, so the optimizer's share is larger than it is."""
    ours, adamw = (compiled.cost_analysis() for compiled in case[3])
    assert 1 <= ours["flops"] / adamw["flops"] <= 1.001
    assert ours["bytes accessed"] / adamw["bytes accessed"] <= 1.001


def test_weights_are_gathered_a_layer_at_a_time(case):
    model, topology, sizes, (compiled, _) = case
    config = KNOWN_CONFIGS[model]
    largest = 2 * config.hidden_size * config.intermediate_size // sizes.get("tensor", 1)
    found = read_collectives(compiled.as_text(), topology.chips)
    gathers = [each for each in found if each.kind == "all-gather" and each.result_bytes >= largest]
    in_layers = [each for each in gathers if each.in_loop]
    assert in_layers
    assert max(each.result_bytes for each in in_layers) == largest
    assert {each.runs for each in in_layers} == {config.num_layers}
    # Outside the layers only the embedding is gathered.
    embedding = 2 * config.vocab_size * config.hidden_size // sizes.get("tensor", 1)
    assert all(each.result_bytes <= embedding for each in gathers)


def test_a_whole_plan():
    topology = parse_topology("v5e:4x4")
    plan = plan_step(workload("qwen2-0.5b"), topology, {"data": 2, "fsdp": 8}, use_compiler=True)
    assert plan.source == "compiled"
    assert plan.fits
    estimate = estimated_work(workload("qwen2-0.5b"), abstract_mesh(2, 8, 1))
    assert estimate.flops == pytest.approx(plan.work.flops, rel=0.25)
    assert 0.3 < estimate.memory / plan.work.memory < 3


def test_too_large_a_step_is_refused_with_the_compilers_figure():
    large = replace(workload("llama-3.2-1b"), rows=256, length=2048, num_targets=2048, remat=False)
    plan = plan_step(large, parse_topology("v5e:2x2"), {"fsdp": 4}, use_compiler=True)
    assert not plan.fits
    assert plan.memory > parse_topology("v5e:2x2").chip.hbm
    assert any("--remat" in change for change in plan.advice())


def test_a_slice_that_is_not_offered():
    with pytest.raises(ValueError, match=r"libtpu gives no slice v5e:3x5: (?!.*lockfile)"):
        topology_devices(parse_topology("v5e:3x5"))
