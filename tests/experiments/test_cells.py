"""Cells: what names them, what skips them, and the same trained alone and together."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from experiments.running.cells import (
    Cell,
    Options,
    append,
    as_written,
    finished,
    part_of,
    read_lines,
    run_cells,
    stable_at,
)
from experiments.running.shared import shared_questions, trained_model
from experiments.running.together import train_together
from stable_lora_jax.evaluation import evaluate
from stable_lora_jax.finetune import RunConfig, finetune, load_with_adapter
from stable_lora_jax.training import RunDirectory
from tests.models import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("cells")
    lines = [{"question": f"{i:02}?", "choices": [f"{i:02}", "xx"], "answer_index": 0} for i in range(24)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {"batch_size": 4, "rank": 2, "loss": "choices", "holdout": 8, "lam": 0.1, "steps": 4}
    return RunConfig.of(
        model=str(tiny.save_with_tokenizer(folder / "model")), data=str(folder / "sums.jsonl"), **common
    )


def options_in(folder: Path, **changes) -> Options:
    return Options(results=folder / "results", runs=folder / "runs", **changes)


def test_the_key_is_of_what_is_computed(base, tmp_path):
    key = Cell(train=base).key
    assert Cell(train=base.with_options(run_dir=tmp_path, save_every=1, resume=True)).key == key
    whole: dict[str, Any] = {"alpha": 16, "lam": 0}  # as the command line would not write them
    assert Cell(train=base.with_options(**whole)).key == Cell(train=base.with_options(alpha=16.0, lam=0.0)).key
    others = [
        Cell(train=base.with_options(seed=1)),
        Cell(train=base.with_options(lam=0.2)),
        Cell(train=base, score_on="test"),
    ]
    assert len({key, *(cell.key for cell in others)}) == 4
    # A line from before an option existed still counts: what it did is today's default.
    old = {"data": "arc_easy", "method": "adamw", "seed": 3}
    sections = {"data": {"name": "arc_easy"}, "method": {"name": "adamw"}, "schedule": {"seed": 3}}
    append(tmp_path / "old.jsonl", {"train": sections, "score_on": "validation"})
    assert list(finished("old", tmp_path)) == [Cell(train=RunConfig.of(**old)).key]


def test_steps_until_stable_of_stacks_and_of_single_pairs(tmp_path):
    norms = {"layers/q": {"norm_a": [1.0, 2.0]}, "head": {"norm_a": 3.0}, "tail": {"norm_a": 3.0}}
    lines = [{"step": 0, "norms": norms}]
    lines += [{"step": 5, "pair": "layers/q", "index": [1], "stable": True}]
    lines += [{"step": 7, "pair": "head", "index": [], "stable": True}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stable_at(tmp_path) == {"layers/q": [0, 5], "head": [7], "tail": [0]}


def test_together_is_as_alone_and_a_failure_is_a_line_too(base, tmp_path):
    own = {"learning_rate": 1e-2, "alpha": 4.0, "a_scale": 0.5, "weight_decay": 0.1}
    numbers = [own, {"learning_rate": 3e38}, {"seed": 1, "alpha": 16.0}]
    cells = [Cell(train=base.with_options(**each), score_on="holdout") for each in numbers]
    alone = run_cells("x", cells[:2], options_in(tmp_path / "alone"))
    options = options_in(tmp_path / "together", together=4)
    together = run_cells("x", cells, options)
    files = [tmp_path / kind / "runs" / "x" / cells[0].key / "adapter.safetensors" for kind in ("alone", "together")]
    first, second = map(load_file, files)
    for name, matrix in first.items():
        np.testing.assert_allclose(second[name], matrix, atol=1e-5)
    for field in ("stable_at", "correct_token", "questions", "steps", "train"):
        assert alone[0][field] == together[0][field]
    assert len(alone[0]["correct_token"]) == 8
    assert alone[0]["accuracy_token"] == np.mean([bit == "1" for bit in alone[0]["correct_token"]])
    for lines in (alone, together):
        assert "Step" in lines[1]["failed"]
        assert "accuracy_token" not in lines[1]
    # None is run again.
    before = (options.results / "x.jsonl").read_bytes()
    assert run_cells("x", cells, options) == together == read_lines("x", options.results)
    assert (options.results / "x.jsonl").read_bytes() == before


def test_adapters_of_all_scales_are_scored_by_one_program_and_as_they_are(base, tmp_path):
    structures = []
    for alpha in (4.0, 6.0, 16.0):  # s = 2, 3 and 8
        config = base.with_options(alpha=alpha, run_dir=tmp_path / str(alpha))
        finetune(config)
        model = trained_model(config.model, config.directory)
        plain = load_with_adapter(config.model.name, config.directory)
        examples = shared_questions(config.model.name, config.data, "holdout")
        for one, other in zip(*(evaluate(each, examples).log_likelihood for each in (model, plain)), strict=True):
            np.testing.assert_array_equal(one, other)
        structures.append(nnx.split(model)[0])
    assert structures[0] == structures[2] != structures[1]


def test_validations_together_are_those_alone_and_keep_the_same_adapters(base, tmp_path):
    # At the lower rate the last validation is not the best one.
    early = [base.with_options(learning_rate=rate, steps=5, eval_every=2, keep_best=True) for rate in (1e-2, 2e-2)]
    cells = [Cell(train=train, score_on="holdout") for train in early]
    found = {}
    for together in (1, 2):
        options = options_in(tmp_path / str(together), together=together)
        lines = run_cells("x", cells, options)
        assert ["together" in line for line in lines] == [together == 2] * 2
        runs = [RunDirectory(options.runs / "x" / cell.key) for cell in cells]
        validated = [[line for line in run.metrics() if "validation" in line] for run in runs]
        losses = [[line["validation"]["loss"] for line in each] for each in validated]
        steps = [[line["step"] for line in each] for each in validated]
        found[together] = steps, losses, [load_file(run.adapter) for run in runs]
    assert found[1][0] == found[2][0] == [[2, 4, 5]] * 2
    np.testing.assert_allclose(found[1][1], found[2][1], rtol=1e-4)
    assert np.argmin(found[1][1][0]) == 1
    for one, other in zip(found[1][2], found[2][2], strict=True):
        for name, matrix in one.items():
            np.testing.assert_allclose(other[name], matrix, atol=1e-4)


def test_what_ends_by_its_validation_is_trained_alone(base, tmp_path):
    ending = [base.with_options(learning_rate=rate, eval_every=2, patience=1) for rate in (1e-2, 2e-2)]
    cells = [Cell(train=train, score_on="holdout") for train in (*ending, base, base.with_options(seed=1))]
    lines = run_cells("x", cells, options_in(tmp_path, together=4))
    assert ["together" in line for line in lines] == [False, False, True, True]
    with pytest.raises(ValueError, match="not trained together"):
        train_together(ending)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's, as Ray starts its processes
def test_ray_runs_what_is_missing(base, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it leaves a token in the home directory
    cells = [Cell(train=base.with_options(seed=seed), score_on="holdout") for seed in range(3)]
    alone = run_cells("x", cells, options_in(tmp_path / "alone"))
    options = options_in(tmp_path / "ray", ray=1)
    append(options.results / "x.jsonl", as_written(alone[0]))  # found there, not run again
    failing = Cell(train=base.with_options(data=str(tmp_path / "nowhere.jsonl")))
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        with pytest.raises(ray.exceptions.RayError, match=r"nowhere\.jsonl"):
            run_cells("x", [failing, *cells], options)
    finally:
        ray.shutdown()
    lines = run_cells("x", cells, options)  # all are there, so no cluster is asked for
    assert not ray.is_initialized()
    assert lines[0] == alone[0]
    for field in ("key", "train", "stable_at", "correct_token", "accuracy_token", "commit", "versions"):
        assert [line[field] for line in lines] == [line[field] for line in alone]
    for cell in cells[1:]:
        files = [tmp_path / kind / "runs" / "x" / cell.key / "adapter.safetensors" for kind in ("alone", "ray")]
        assert files[0].read_bytes() == files[1].read_bytes()
    written = read_lines("x", options.results)
    assert sorted(line["key"] for line in written) == sorted(cell.key for cell in cells)


def test_without_ray_the_error_names_the_extra(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"--ray needs Ray. Run: pip install 'stable-lora-jax\[ray\]'"):
        run_cells("x", [Cell(train=base)], options_in(tmp_path, ray=1))


def test_parts_are_all_cells_once(base, tmp_path):
    cells = [Cell(train=base.with_options(seed=seed)) for seed in range(5)]
    parts = [part_of(cells, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(cell.train.schedule.seed for part, _ in parts for cell in part) == [0, 1, 2, 3, 4]
    assert [suffix for _, suffix in parts] == [".1of3", ".2of3", ".3of3"]
    assert part_of(cells, "1/1") == (cells, "")
    for name in ("x", "x.2of3", "xy", "x.1of3"):
        append(tmp_path / f"{name}.jsonl", {"name": name})
    assert [line["name"] for line in read_lines("x", tmp_path)] == ["x", "x.1of3", "x.2of3"]
    for part in ("3", "0/2", "3/2", "a/b"):
        with pytest.raises(ValueError, match=r"is not understood.*3/8"):
            part_of(cells, part)
