"""A plan adds up, says what binds, refuses meshes that cannot be, and advises where the step does not fit."""

from dataclasses import replace

import pytest

from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Workload, parse_topology, plan_step

WORKLOAD = Workload(config=KNOWN_CONFIGS["llama-3.2-1b"], rows=16, length=256, num_targets=256)
SLICE = parse_topology("v5e:4x4")


def planned(workload=WORKLOAD, topology=SLICE, **sizes):
    return plan_step(workload, topology, sizes or {"fsdp": 16}, use_compiler=False)


def test_an_estimate_adds_up():
    plan = planned()
    assert plan.source == "estimate"
    assert plan.fits
    assert plan.frozen == 1_235_814_400
    # r (n + m) of q and v in 16 layers
    assert plan.trainable == 16 * 8 * (2048 + 2048 + 2048 + 512)
    # The frozen weights take part in two products a token, and the embedding in two more; attention adds a little.
    assert plan.work.flops * 16 == pytest.approx(4 * plan.frozen * WORKLOAD.tokens, rel=0.1)
    # The weights' sixteenth, adapters and two moments.
    assert plan.work.arguments == pytest.approx(2 * plan.frozen / 16 + 12 * plan.trainable, rel=0.01)
    least, most = plan.step_seconds
    assert least == plan.seconds[plan.binds] < most == sum(plan.seconds.values())
    assert plan.run_cost(3600, 1.5) == pytest.approx((least * 16 * 1.5, most * 16 * 1.5))


def test_what_binds_follows_the_work():
    long = replace(WORKLOAD, rows=1024, remat=True, accumulate=1)
    assert planned(long).binds == "compute"
    assert planned(replace(WORKLOAD, length=16, num_targets=16)).binds == "links"  # gathering weights for a few tokens
    whole = planned(replace(WORKLOAD, length=16, num_targets=16), data=16)
    assert whole.binds == "memory"
    assert [exchange.kind for exchange in whole.exchanges] == ["all-reduce"]


def test_remat_and_parts_save_memory():
    plain = planned(replace(WORKLOAD, rows=64, length=1024))
    for change in ({"remat": True}, {"accumulate": 4}):
        assert planned(replace(plain.workload, **change)).memory < plain.memory


def test_what_does_not_fit_is_told_what_to_change():
    large = Workload(config=KNOWN_CONFIGS["llama-3.1-70b"], rows=16, length=2048, num_targets=2048)
    plan = planned(large, data=4, fsdp=4)
    assert not plan.fits
    advice = "\n".join(plan.advice())
    for word in ("--remat", "--length 1024", "--mesh fsdp=16", "larger slice or chip than v5e:4x4"):
        assert word in advice
    assert "--accumulate" not in advice  # one row per chip is the least there is
    for rows, halved in ((32, True), (48, False)):  # three rows per chip have no half
        assert ("--accumulate 2" in "\n".join(planned(replace(large, rows=rows)).advice())) == halved
    assert planned().advice() == []


@pytest.mark.parametrize(
    ("sizes", "changes", "told"),
    [
        ({"fsdp": 8}, {}, r"data=1, fsdp=8, tensor=1 has 8 devices, and v5e:4x4 has 16 chips"),
        ({"fsdp": 16}, {"rows": 24}, r"batch of 24 rows.*fsdp=16"),
        ({"fsdp": 16}, {"rows": 32, "accumulate": 4}, r"32 rows in accumulate=4 parts has 8 rows a part.*fsdp=16"),
        ({"tensor": 16}, {}, r"tensor=16 does not divide the model's num_kv_heads=8.*among 1, 2, 4, 8"),
        (
            {"fsdp": 16},
            {"config": replace(WORKLOAD.config, hidden_size=2056)},
            r"fsdp=16 does not divide the 2056 of embed_tokens.embedding",
        ),
    ],
)
def test_errors(sizes, changes, told):
    with pytest.raises(ValueError, match=told):
        planned(replace(WORKLOAD, **changes), **sizes)
