"""Validation while training: right numbers, the best adapter, an early end, and all of it alike after a resume."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from stable_lora_jax.data import Batch, TrainBatches, eval_batches, make_batch, right_branch_only
from stable_lora_jax.evaluation import evaluate, likelihood
from stable_lora_jax.training import (
    Validation,
    make_loss,
    make_mesh,
    make_optimizer,
    newest_step,
    read_metrics,
    split_model,
    train,
)
from stable_lora_jax.training.distributed import to_mesh
from stable_lora_jax.training.sharding import placement_on, replicated
from stable_lora_jax.training.step import join_model, place
from tests.training.tiny_runs import adapted, naive_log_likelihoods, questions, trees_equal

TRAINED, HELD_OUT = [right_branch_only(example) for example in questions(24)], questions(7, seed=5)
RATE = optax.constant_schedule(0.05)  # high, so that what is learnt by heart harms the rest


def run(directory, validation, *, model=None, steps=12, **kwargs):
    """Trains and returns the model and the result."""
    model = model or adapted()
    directory.mkdir(exist_ok=True)
    defaults = {"save_every": 4, "progress": False, "learning_rate": RATE}
    result = train(
        model,
        TrainBatches(TRAINED, batch_size=8, seed=0, max_length=64),
        make_optimizer("adamw", RATE, weight_decay=0.0, clip_norm=1.0),
        loss=make_loss("answer", 1),
        total_steps=steps,
        run_dir=directory,
        validation=validation,
        **defaults | kwargs,
    )
    return model, result


def measured(directory):
    lines = read_metrics(directory / "metrics.jsonl")
    return {line["step"]: line["validation"] for line in lines if "validation" in line}


@pytest.mark.parametrize("loss", ["answer", "choices"])
def test_it_is_the_training_loss_of_other_examples(loss):
    model = adapted()
    found = Validation(HELD_OUT, loss, every=1).measure(model)
    examples = [right_branch_only(each) for each in HELD_OUT] if loss == "answer" else HELD_OUT
    total, count = make_loss(loss, 4)(model, Batch(*map(jax.numpy.asarray, make_batch(examples))))
    assert found.loss == pytest.approx(float(total / count), abs=1e-5)
    per_token = [
        np.array(naive_log_likelihoods(model, each)) / [len(branch) for branch in each.branches] for each in HELD_OUT
    ]
    right = [scores.argmax() == each.answer for scores, each in zip(per_token, HELD_OUT, strict=True)]
    assert found.accuracy == np.mean(right)
    assert Validation([right_branch_only(each) for each in HELD_OUT], "answer", every=1).measure(model).accuracy is None


def test_the_best_adapter_is_the_result(tmp_path):
    validation = Validation(HELD_OUT, "answer", every=2)
    model, result = run(tmp_path / "run", validation, keep_best=True, steps=20)
    losses = {step: each["loss"] for step, each in measured(tmp_path / "run").items()}
    assert list(losses) == list(range(2, 21, 2))
    best = min(losses, key=losses.__getitem__)
    assert best < 20
    assert (result.steps, result.best_step) == (20, best)
    assert validation.measure(model).loss == pytest.approx(losses[best], abs=1e-6)
    last, result = run(tmp_path / "last", validation)
    assert result.best_step == result.steps == 12
    assert result.validation == validation.measure(last)
    # Validation does not touch what is trained.
    without, _ = run(tmp_path / "without", None)
    assert trees_equal(*(nnx.state(each, nnx.LoRAParam) for each in (last, without)))


def test_patience_ends_the_run_and_resuming_it_changes_nothing(tmp_path):
    validation = Validation(HELD_OUT, "answer", every=1, patience=2)
    model, result = run(tmp_path / "run", validation, keep_best=True)
    losses = [each["loss"] for each in measured(tmp_path / "run").values()]
    assert result.steps == len(losses) < 12
    assert result.stopped_by is None
    assert int(np.argmin(losses)) == len(losses) - 3
    assert result.best_step == result.steps - 2
    again, resumed = run(tmp_path / "run", validation, keep_best=True, resume=True)
    assert (resumed.steps, resumed.best_step) == (result.steps, result.best_step)
    assert trees_equal(*(nnx.state(each, nnx.LoRAParam) for each in (model, again)))
    # Stopped after three steps, and resumed: the same validations and the same end.
    run(tmp_path / "begun", validation, keep_best=True, steps=3)
    other, result_again = run(tmp_path / "begun", validation, keep_best=True, resume=True)
    assert measured(tmp_path / "begun") == measured(tmp_path / "run")
    assert result_again.best_step == result.best_step
    assert trees_equal(*(nnx.state(each, nnx.LoRAParam) for each in (model, other)))
    assert newest_step(tmp_path / "begun" / "checkpoints") == result.steps


def test_on_a_mesh(tmp_path):
    validation = Validation(HELD_OUT, "answer", every=3)
    run(tmp_path / "one", validation, steps=3)
    run(tmp_path / "eight", validation, steps=3, mesh=make_mesh(2, 2, 2))
    one, eight = (measured(tmp_path / name)[3] for name in ("one", "eight"))
    assert one["loss"] == pytest.approx(eight["loss"], abs=1e-4)


def test_devices_share_the_examples():
    """Each scores its part of the rows, the scores are those of one device, and a shape is compiled once."""
    model, mesh = adapted(), make_mesh(2, 2, 1)
    alone = evaluate(model, HELD_OUT)
    graph, adapters, frozen = split_model(model)
    frozen, adapters = to_mesh(frozen, place(mesh, frozen)), to_mesh(adapters, replicated(mesh))
    before = likelihood._score_rows._cache_size()
    batches = eval_batches(HELD_OUT, max_tokens=4 * 2048, multiple=4)
    for _ in range(2):
        shared = join_model(graph, adapters, frozen, placement_on(mesh))
        found = evaluate(shared, HELD_OUT)
        for ours, theirs in zip(found.log_likelihood, alone.log_likelihood, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert likelihood._score_rows._cache_size() - before == len({batch.tokens.shape for _, batch in batches})
    rows, width = batches[0][1].tokens.shape
    assert rows % 4 == 0
    graph, state = nnx.split(nnx.view(shared, deterministic=True, raise_if_not_found=False))
    program = likelihood._score_rows.lower(graph, state, batches[0][1]).compile().as_text()
    size = model.config.hidden_size
    assert f"f32[{rows // 4},{width},{size}]" in program
    assert f"f32[{rows},{width},{size}]" not in program


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "answer", 1), "nothing to validate on"),
        ((HELD_OUT, "answer", 0), "eval_every=0, patience=None; both count from 1"),
        ((HELD_OUT, "answer", 1, 0), "patience=0; both count from 1"),
        ((TRAINED, "choices", 1), "validate on questions, not on completions"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Validation(*arguments)
