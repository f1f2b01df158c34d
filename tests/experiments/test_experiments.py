"""Every experiment from end to end on a tiny model; what is committed is what the lines say."""

import importlib
from pathlib import Path

import pytest

from experiments import ablation, make_results, tables
from experiments.ablation_tables import NEVER, name_of
from experiments.cells import read_lines

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", list(make_results.EXPERIMENTS))
def test_smoke(name, capsys):
    module = importlib.import_module(f"experiments.{name}")
    (config,) = (
        value for key, value in vars(module).items() if key.endswith("Config") and value.__module__ == module.__name__
    )
    module.main(config(smoke=True))
    assert "| --- |" in capsys.readouterr().out


def test_methods_are_chosen_at_every_length():
    config = ablation.AblationConfig(lengths=(1, 3), steps=10, seeds=2, methods=("stable-lora",))
    trained = [cell.train for cell in ablation.cells(config)]
    assert {train.method for train in trained} == {"stable-lora"}
    longer = [(train.lam, train.seed) for train in trained if train.steps == 30]
    assert longer == [(config.controls[0], 0), (config.controls[0], 1)]


def test_committed_tables_are_those_of_the_committed_lines(tmp_path, monkeypatch):
    results = ROOT / "experiments" / "results"
    copies = tmp_path / "results"
    copies.mkdir()
    for file in results.rglob("*.json*"):
        copy = copies / file.relative_to(results)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    made = make_results.sections(copies)
    for name, text in made.items():
        assert (results / f"{name}.md").read_text() == make_results.page(name, text), "run make results"
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text()
    again = make_results.readme(text, made, Path("experiments/results"))
    assert text == again, "run make results"


def test_the_findings_are_those_of_the_lines():
    """What the README's first lines say, worked out from the committed lines."""
    results, readme = ROOT / "experiments" / "results", " ".join((ROOT / "README.md").read_text().split())

    def lines_of(name, **wanted):
        return [line for line in read_lines(name, results) if line["train"].items() >= wanted.items()]

    stable, adamw = (lines_of("qa", data="arc_easy", method=method) for method in ("stable-lora", "adamw"))
    own, same = tables.compared(stable, adamw), tables.compared(stable, lines_of("qa_controls", data="arc_easy"))
    assert own is not None
    assert same is not None
    assert f"{tables.percent(own.points)} points above AdamW" in readme
    assert f"{tables.percent(same.points)} at the same η and s" in readme
    assert f"({tables.number(same.nats, 3).removeprefix('-')} nats per token at η = 5e-4, s = 16)" in readme
    assert same.nats.high < 0
    short = {"steps": 281, "alpha": 16 * 8}
    variants = tables.grouped(lines_of("ablation", **short), name_of)
    for name in (f"λ = {lam:g}" for lam in ablation.AblationConfig.lams):
        found = tables.compared(variants[name], variants["AdamW"])
        assert found is not None
        assert abs(100 * found.points.value) < 0.55
    variants = tables.grouped(lines_of("ablation", steps=843), name_of)
    long = tables.compared(variants["λ = 0.001"], variants["AdamW"])
    assert long is not None
    told = f"after three epochs on answers, λ = 0.001 is {tables.percent(long.points)} points above AdamW, and the "
    told += f"right answers are {tables.number(long.nats, 3).removeprefix('-')} nats per token likelier "
    assert told + ("(two seeds)" if len(variants["λ = 0.001"]) == 2 else "(three seeds)") in readme
    assert long.nats.high < 0
    variants = tables.grouped(lines_of("ablation", steps=281, alpha=2 * 8), name_of)
    for name, told in (("λ = 0.02", "{} points below AdamW"), (f"λ = 0.02{NEVER}", "without the rule {}.")):
        found = tables.compared(variants["AdamW"], variants[name])
        assert found is not None
        assert told.format(tables.percent(found.points)) in readme
