"""Many adapters at once: each is its single run's, whatever becomes of the others."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.data import Encoded, TrainBatches
from stable_lora_jax.lora import inject_lora
from stable_lora_jax.training import (
    SweepPoint,
    compile_step,
    init_state,
    learning_rate_schedule,
    make_loss,
    make_mesh,
    make_optimizer,
    split_model,
    train_sweep,
)
from tests.models import tiny
from tests.training.tiny_runs import VOCAB, adapted

STEPS = 5
LOSS = make_loss("choices", 2)
# λ such that some pairs stop, at different steps; the second diverges in its second step.
POINTS = (
    SweepPoint(3e-2, 2.0, 0.2, 1.0, 0.01),
    SweepPoint(float("nan"), 2.0, 0.2, 4.0, 0.01),
    SweepPoint(3e-2, 8.0, 0.4, 2.0, 0.2),
)


def model_of(seed: int, scale: float = 2.0) -> Any:
    return inject_lora(tiny.decoder(vocab_size=VOCAB), 2, 2 * scale, "qv", rngs=nnx.Rngs(seed))


def batches_of(seed: int) -> TrainBatches:
    """Batches of one shape, in an order of their own."""
    rng = np.random.default_rng(0)
    rows = [tuple(map(tuple, rng.integers(1, 61, (4, 3)).tolist())) for _ in range(12)]
    examples = [Encoded(first + second, (right, wrong), 0) for first, second, right, wrong in rows]
    return TrainBatches(examples, batch_size=4, seed=seed, max_length=64)


def optimizer_of(method: str, point: SweepPoint):
    rate = learning_rate_schedule(point.learning_rate, STEPS, 2, "cosine")
    numbers = {"lam": point.lam, "ratio": point.ratio, "weight_decay": point.weight_decay}
    return make_optimizer(method, rate, **numbers, clip_norm=1.0)


def sweep(method: str, watch=None):
    """All points, shared by three devices."""
    parts = [split_model(model_of(seed)) for seed in range(len(POINTS))]
    graph, _, frozen = parts[0]
    return train_sweep(
        *(graph, frozen, [adapters for _, adapters, _ in parts], [batches_of(seed) for seed in range(len(POINTS))]),
        points=POINTS,
        make_optimizer=lambda point: optimizer_of(method, point),
        loss=LOSS,
        total_steps=STEPS,
        mesh=make_mesh(3),
        watch=watch,
        every=2,
        progress=False,
    )


def single(method: str, seed: int):
    """The adapters and losses of a run by the ordinary step, in a model whose own scale is the point's."""
    graph, adapters, frozen = split_model(model_of(seed, float(POINTS[seed].scale)))
    optimizer, batches, mesh = optimizer_of(method, POINTS[seed]), batches_of(seed), make_mesh()
    step = compile_step(graph, LOSS, optimizer, mesh=mesh, frozen=frozen)
    state, losses = init_state(adapters, optimizer), []
    for index in range(STEPS):
        state, metrics = step(state, frozen, batches[index])
        losses.append(float(metrics.loss))
    return state.adapters, losses


def largest_difference(one, other) -> float:
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), one, other))
    )


@pytest.mark.parametrize(("method", "seeds"), [("stable-lora", (0, 2)), ("lora-plus", (2,))])
def test_each_adapter_is_that_of_its_single_run_whatever_becomes_of_the_others(method, seeds):
    seen: dict[int, Any] = {}
    result = sweep(method, lambda step, adapters: seen.update({step: jax.device_get(adapters)}))
    assert list(seen) == [2, 4, STEPS]
    for seed in seeds:
        before, last = (jax.tree.map(lambda x, seed=seed: x[seed], seen[step]) for step in (4, STEPS))
        assert largest_difference(last, result.adapters[seed]) == 0 < largest_difference(last, before)
        adapters, losses = single(method, seed)
        assert largest_difference(result.adapters[seed], adapters) <= 1e-5
        np.testing.assert_allclose(result.losses[:, seed], losses, rtol=1e-5)
    # The tolerance is small beside what distinguishes them.
    assert largest_difference(result.adapters[0], split_model(model_of(0))[1]) > 1e-2
    assert np.isnan(jax.tree.leaves(result.adapters[1])[0]).any()
    assert result.failed_at.tolist() == [0, 1, 0]  # its first update is not finite
    if method == "stable-lora":
        stops = np.concatenate([at[[0, 2]].ravel() for at in result.stable_at.values()])
        assert len(set(stops.tolist())) > 2  # at different steps, or never


def test_a_model_for_cudnn_has_its_attention_written_out():
    def losses(attention):
        model = model_of(0)
        model.attention = attention
        graph, start, frozen = split_model(model)
        runs = {"make_optimizer": lambda point: optimizer_of("adamw", point), "loss": LOSS, "total_steps": 2}
        return train_sweep(graph, frozen, [start], [batches_of(0)], POINTS[:1], progress=False, **runs).losses

    np.testing.assert_array_equal(losses("cudnn"), losses("xla"))


def test_errors():
    graph, start, frozen = split_model(model_of(0))
    given = {"make_optimizer": lambda point: optimizer_of("adamw", point), "loss": LOSS, "total_steps": 1}
    with pytest.raises(ValueError, match=r"2 points, 1 starts and 2 sequences"):
        train_sweep(graph, frozen, [start], [batches_of(0)] * 2, POINTS[:2], **given)
    with pytest.raises(ValueError, match=r"every=0 is below 1"):
        train_sweep(graph, frozen, [start], [batches_of(0)], POINTS[:1], every=0, **given)
    with pytest.raises(ValueError, match=r"3 adapters cannot be shared evenly by 2 devices"):
        train_sweep(graph, frozen, [start] * 3, [batches_of(0)] * 3, POINTS, mesh=make_mesh(2), **given)
    graph, start, frozen = split_model(adapted(dropout=0.1))
    with pytest.raises(ValueError, match="cannot train with dropout"):
        train_sweep(graph, frozen, [start], [batches_of(0)], POINTS[:1], **given)
