"""Every experiment from end to end on a tiny model; what is committed is what the lines say."""

import json
from pathlib import Path

import pytest

from experiments import make_results, verdict
from experiments.studies import ablation

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", list(make_results.EXPERIMENTS))
def test_smoke(name, capsys):
    module = make_results.EXPERIMENTS[name]
    (config,) = (
        value for key, value in vars(module).items() if key.endswith("Config") and value.__module__ == module.__name__
    )
    module.main(config(smoke=True))
    assert "| --- |" in capsys.readouterr().out


def test_methods_are_chosen_at_every_length():
    config = ablation.AblationConfig(lengths=(1, 3), steps=10, seeds=2, methods=("stable-lora",))
    trained = [cell.train for cell in ablation.cells(config)]
    assert {train.method.name for train in trained} == {"stable-lora"}
    longer = [(train.method.lam, train.schedule.seed) for train in trained if train.schedule.steps == 30]
    assert longer == [(config.controls[0], 0), (config.controls[0], 1)]


def test_committed_tables_are_those_of_the_committed_lines(tmp_path):
    results = ROOT / "experiments" / "results"
    copies = tmp_path / "results"
    copies.mkdir()
    for file in (*results.rglob("*.json*"), *results.rglob("*.npz")):
        copy = copies / file.relative_to(results)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    made = make_results.sections(copies)
    for name, text in made.items():
        assert (results / f"{name}.md").read_text() == make_results.page(name, text), "run make results"
    blocks, used = make_results.blocks(made, copies), set()
    for document in make_results.DOCUMENTS:
        text = (ROOT / document).read_text()
        assert make_results.filled(text, blocks) == text, "run make results"
        used |= {name for name in blocks if f"<!-- {name}: made by" in text}
    assert used == set(blocks)


def test_verdict_of_a_study_begun_again_is_the_pilots(tmp_path):
    results = ROOT / "experiments" / "results"
    (tmp_path / "pilot").symlink_to(results / "pilot")
    lines = (results / "rates.jsonl").read_text().splitlines(keepends=True)
    begun = [line for line in lines if json.loads(line)["train"]["method"]["name"] == "adamw"]
    whole = verdict.verdict(results)
    for kept, there in ((lines, True), (begun, False)):
        (tmp_path / "rates.jsonl").write_text("".join(kept))
        text = verdict.verdict(tmp_path)
        assert (text == whole) == there
        assert ("nats with few data and many passes at η" in text) == there
        assert ("became stable" in verdict.stopping(tmp_path)) == there
