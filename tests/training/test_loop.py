"""The loop: a resumed run is the uninterrupted one, bit by bit."""

import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax.data import Batch, TrainBatches, right_branch_only
from stable_lora_jax.evaluation import evaluate
from stable_lora_jax.optim import lora_rite_report
from stable_lora_jax.training import (
    METHODS,
    NonFiniteLossError,
    checkpoints,
    init_state,
    make_loss,
    make_mesh,
    make_optimizer,
    newest_step,
    read_metrics,
    split_model,
    stop_steps,
    train,
)
from stable_lora_jax.training.distributed import to_mesh
from stable_lora_jax.training.sharding import replicated
from tests.training.tiny_runs import adapted, questions, trees_equal

EXAMPLES = [right_branch_only(example) for example in questions(24)]


def batches(batch_size=8):
    return TrainBatches(EXAMPLES, batch_size=batch_size, seed=0, max_length=64)


# Not constant, so that a resumed run must know where in it it stands.
RATE = optax.linear_schedule(1e-2, 1e-3, 6)


def optimizer_for(method):
    return make_optimizer(method, RATE, lam=0.2, ratio=4.0, weight_decay=0.01, clip_norm=1.0)


def run(directory, method="stable-lora", *, model=None, optimizer=None, dropout=0.0, steps=6, **kwargs):
    """Trains and returns the model and the result."""
    model = model or adapted(dropout=dropout)
    directory.mkdir(exist_ok=True)
    defaults = {"save_every": 3, "norms_every": 1, "progress": False, "learning_rate": RATE}
    result = train(
        *(model, batches(), optimizer or optimizer_for(method)),
        loss=make_loss("answer", 1),
        total_steps=steps,
        run_dir=directory,
        **defaults | kwargs,
    )
    return model, result


def saved_state(directory, method="stable-lora", dropout=0.0):
    _, adapters, _ = split_model(adapted(dropout=dropout))
    with checkpoints(directory / "checkpoints", 2) as saved:
        return saved.restore(init_state(adapters, optimizer_for(method)))


def lines_without_speed(directory):
    lines = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize(("method", "dropout"), [*((method, 0.0) for method in METHODS), ("stable-lora", 0.3)])
def test_resumed_equals_uninterrupted(tmp_path, method, dropout):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    model, result = run(whole, method, dropout=dropout)
    assert (result.steps, result.stopped_by) == (6, None)
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [3, 6]
    # As if killed in step 6: the newest checkpoint is that of step 3, and the last line of the metrics is cut.
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "6")
    metrics = killed / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-7])
    resumed, again = run(killed, method, dropout=dropout, resume=True)
    assert again == result
    assert trees_equal(saved_state(killed, method, dropout), saved_state(whole, method, dropout))
    assert trees_equal(split_model(resumed)[1], split_model(model)[1])
    assert lines_without_speed(killed) == lines_without_speed(whole)
    losses = [line["step"] for line in lines_without_speed(killed) if "loss" in line]
    assert losses == [1, 2, 3, 4, 5, 6]
    rite = {line["step"]: line["lora_rite"] for line in lines_without_speed(whole) if "lora_rite" in line}
    if method == "lora-rite":
        pairs = sorted(f"layers/self_attn/{name}/lora" for name in ("q_proj", "v_proj"))
        saved = saved_state(whole, method)
        report = lora_rite_report(saved.adapters, saved.opt_state)
        assert sorted(rite) == list(range(7))
        assert sorted(rite[6]["skipped_a"]) == sorted(rite[6]["skipped_b"]) == pairs
        assert rite[6]["clip_factor"] == pytest.approx(float(report.clip_factor), rel=1e-6)
        for side in ("skipped_a", "skipped_b"):
            assert rite[6][side] == {pair: count.tolist() for pair, count in getattr(report, side).items()}
    else:
        assert not rite


def test_the_model_holds_what_the_checkpoint_holds(tmp_path):
    model, _ = run(tmp_path)
    adapters = split_model(model)[1]
    assert trees_equal(adapters, saved_state(tmp_path).adapters)
    before = split_model(adapted())[1]
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x != y).any()), adapters, before))
    assert int(saved_state(tmp_path).step) == 6


def test_stops_are_recorded_at_their_step(tmp_path, capsys):
    run(tmp_path, progress=True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    gaps = {line["step"]: line["norms"] for line in lines if "norms" in line}
    assert sorted(gaps) == list(range(7))
    assert all(("delta_1" in pair) == (step > 0) for step, pairs in gaps.items() for pair in pairs.values())
    assert min(value for pair in gaps[1].values() for value in pair["delta_2"]) > 0
    expected = {}
    for pair in gaps[0]:
        for layer in range(3):
            # A step looks at the norms from before it.
            below = [step + 1 for step in range(6) if gaps[step][pair]["gap"][layer] < 1]
            if below:
                expected.setdefault(pair, {})[(layer,)] = below[0]
    assert stop_steps(lines) == expected
    found = {step for stops in expected.values() for step in stops.values()}
    assert len(found) > 1  # at different steps
    for line in lines:
        if "loss" in line:
            stable = sum(step <= line["step"] for stops in expected.values() for step in stops.values())
            assert (line["stable"], line["pairs"]) == (stable, 6)
    assert f"stable pairs={stable}/6" in capsys.readouterr().err


def test_weights_are_cut_up_where_they_are(monkeypatch, eight_devices):
    put, cut = jax.device_put, []

    def watched(tree, sharding):
        cut.extend(jax.tree.leaves(tree) if isinstance(sharding, jax.sharding.NamedSharding) else [])
        return put(tree, sharding)

    with jax.default_device(eight_devices[7]):
        tree = {"weight": jnp.arange(8.0), "key": jax.random.key(0)}
    monkeypatch.setattr(jax, "device_put", watched)
    placed = to_mesh(tree, replicated(make_mesh(4)))
    assert all(leaf.committed and leaf.devices() == {eight_devices[7]} for leaf in cut)
    assert len(cut) == 2
    assert all(leaf.devices() == set(eight_devices[:4]) for leaf in jax.tree.leaves(placed))


def test_a_batch_goes_to_the_devices_in_one_call(monkeypatch, tmp_path):
    put, batches_put = jax.device_put, []

    def counted(x, *args, **kwargs):
        batches_put.extend([x] if isinstance(x, Batch) else [])
        return put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", counted)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", None)
    run(tmp_path, steps=3, mesh=make_mesh(2, 2, 2))
    assert len(batches_put) == 3


@pytest.mark.parametrize(("at", "stopped_by"), [(2, signal.SIGTERM), (3, None)])
def test_a_signal_in_the_last_step_stops_nothing(tmp_path, monkeypatch, at, stopped_by):
    def raise_signal(self, step, *args):
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("stable_lora_jax.training.loop._Record.step", raise_signal)
    _, result = run(tmp_path, steps=3)
    assert (result.steps, result.stopped_by) == (at, stopped_by)


@pytest.mark.parametrize("schedule", [RATE, lambda step: 1e-2])
def test_the_schedule_is_evaluated_once(tmp_path, schedule):
    asked = []
    run(tmp_path, steps=3, learning_rate=lambda step: asked.append(step) or schedule(step))
    assert len(asked) == 1
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    np.testing.assert_allclose(rates, [schedule(step) for step in range(3)], rtol=1e-6)  # float32


def test_resuming_a_finished_run_does_nothing(tmp_path):
    model, _ = run(tmp_path)
    before = lines_without_speed(tmp_path)
    again, result = run(tmp_path, resume=True)
    assert (result.steps, result.stopped_by, result.loss) == (6, None, None)
    assert trees_equal(split_model(again)[1], split_model(model)[1])
    assert lines_without_speed(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    run(tmp_path, steps=3)
    kept = saved_state(tmp_path)
    broken: Any = adapted()
    broken.norm.scale[...] = jnp.full_like(broken.norm.scale[...], jnp.nan)
    before = split_model(broken)[1]
    with pytest.raises(NonFiniteLossError, match=r"Step 4 has loss nan, .*The checkpoint of step 3 is kept"):
        run(tmp_path, model=broken, resume=True)
    assert trees_equal(saved_state(tmp_path), kept)
    assert trees_equal(split_model(broken)[1], before)
    with pytest.raises(NonFiniteLossError, match=r"Step 1 has loss nan, .*No checkpoint was saved yet"):
        run(tmp_path / "new", model=broken)


def test_an_update_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"Step 1 has loss \d.* and update norm (inf|nan)\. No checkpoint"):
        run(tmp_path, steps=1, optimizer=optax.adamw(3e38))  # no square of it is finite
    assert newest_step(tmp_path / "checkpoints") is None


def test_a_damaged_line_is_not_taken_for_the_end(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n<<<<<<< HEAD\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 of 3 is not a JSON object"):
        read_metrics(file)
    file.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(file) == [{"step": 1}]


def test_a_model_trained_on_a_mesh_is_as_usable_as_before(tmp_path):
    single, _ = run(tmp_path / "single", steps=3)
    model, _ = run(tmp_path / "mesh", steps=3, mesh=make_mesh(2, 2, 2), accumulate=2)
    scores, expected = evaluate(model, EXAMPLES[:4]), evaluate(single, EXAMPLES[:4])
    np.testing.assert_allclose(scores.nll_token, expected.nll_token, rtol=1e-4)  # Adam amplifies rounding


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    model, result = run(whole)
    run(moved, steps=3)
    other, again = run(moved, resume=True, mesh=make_mesh(4, 2))
    assert again.loss == pytest.approx(result.loss, rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), split_model(model)[1], split_model(other)[1])


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        run(tmp_path, resume=True)
    run(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"contains checkpoints up to step 1.*resume"):
        run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"batch of 8 rows.*data=3"):
        run(tmp_path / "mesh", steps=1, mesh=make_mesh(3))
    with pytest.raises(ValueError, match=r"8 rows does not split into accumulate=3 equal parts"):
        run(tmp_path / "mesh", steps=1, accumulate=3)
    with pytest.raises(ValueError, match=r"accumulate=4 parts has 2 rows a part.*data=4.*multiple of 16"):
        run(tmp_path / "mesh", steps=1, accumulate=4, mesh=make_mesh(4))
