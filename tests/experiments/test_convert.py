"""Lines of version 0.1 become lines of configurations in sections, and no number changes."""

import json
from pathlib import Path

import pytest

from experiments.running.cells import Cell, cell_of, read_lines
from experiments.running.convert import convert, converted, converted_line
from stable_lora_jax.finetune import RunConfig, fingerprint, options_of

ROOT = Path(__file__).parent.parent.parent
OLD = [json.loads(line) for line in (ROOT / "tests" / "assets" / "lines_0_1.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("old", OLD, ids=lambda line: line["key"])
def test_no_number_changes(old):
    new = converted_line(old)
    assert {name: value for name, value in new.items() if name not in ("train", "key")} == {
        name: value for name, value in old.items() if name not in ("train", "key")
    }
    options = options_of(new["train"])
    assert {name: old["train"][name] for name in options.keys() & old["train"].keys()} == {
        name: options[name] for name in options.keys() & old["train"].keys()
    }
    assert ("lam" in options) == (old["train"]["method"] == "stable-lora")
    assert ("ratio" in options) == (old["train"]["method"] == "lora-plus")
    assert new["key"] == cell_of(new | {"train": options}).key == Cell(train=RunConfig.from_record(new["train"])).key
    assert converted_line(new) == new


def test_of_a_method_without_lambda_one_run_has_one_key():
    (adamw, *_) = (line for line in OLD if line["train"]["method"] == "adamw")
    other = adamw | {"train": adamw["train"] | {"lam": 0.001}}
    assert converted_line(other)["key"] == converted_line(adamw)["key"]


def test_a_run_directory_is_converted_too(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": OLD[0]["train"], "total_steps": 3}))
    with pytest.raises(ValueError, match=r"version 0\.1 wrote it. Convert it by"):
        RunConfig.from_record(OLD[0]["train"])
    convert(file)
    record = json.loads(file.read_text())
    assert record["total_steps"] == 3
    assert fingerprint(RunConfig.from_record(record["config"])) == record["config"]


def test_what_the_new_version_cannot_do_is_refused():
    with pytest.raises(ValueError, match="drop_overlap=True is no more"):
        converted(OLD[0]["train"] | {"drop_overlap": True})


def test_every_committed_line_is_converted():
    results = ROOT / "experiments" / "results"
    lines = [line for file in results.glob("*.jsonl") for line in read_lines(file.stem, results) if "train" in line]
    assert len(lines) > 150
    for line in lines:
        cell_of(line)  # as today's configuration
