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
    assert f"{_points(own, ' points')} above AdamW" in readme
    assert f"{_points(same)} at the same η and s" in readme
    assert f"are {_likelier(same)} nats per token likelier than with AdamW after those 68 steps" in readme
    assert f"AdamW's {-own.nats.value:.3f} become {-same.nats.value:.3f}" in readme
    assert {"learning_rate": 5e-4, "alpha": 128, "lam": 0.005}.items() <= stable[0]["train"].items()
    assert same.nats.high < 0
    short = {"steps": 281, "alpha": 16 * 8}
    variants = tables.grouped(lines_of("ablation", **short), name_of)
    below = [tables.compared(variants["AdamW"], variants[f"λ = {lam:g}"]) for lam in ablation.AblationConfig.lams]
    points = [100 * each.points.value for each in below if each]
    assert f"come out {min(points):.1f} to {max(points):.1f} points below AdamW" in readme
    assert all(each and each.points.low < 0 < each.points.high for each in below)
    assert all(each and each.over_questions.low < 0 < each.over_questions.high for each in below)
    assert below[-1] is not None
    assert f"and {_likelier(below[-1])} less likely after the epoch on answers" in readme
    variants = tables.grouped(lines_of("ablation", steps=843), name_of)
    long = tables.compared(variants["λ = 0.001"], variants["AdamW"])
    assert long is not None
    told = f"after three epochs on answers (the same η and s, not searched), λ = 0.001 is {_points(long, ' points')} "
    told += f"above AdamW, and the right answers are {_likelier(long)} nats per token likelier (three seeds)"
    assert told in readme
    assert len(variants["λ = 0.001"]) == 3
    assert long.nats.high < 0
    (adamw,), (stable,) = (lines_of("ablation", steps=2810, method=method) for method in ("adamw", "stable-lora"))
    told = f"AdamW has {100 * adamw['accuracy_token']:.1f} % and λ = 0.001 {100 * stable['accuracy_token']:.1f} %"
    assert f"{told}, {adamw['nll_token']:.3f} and {stable['nll_token']:.3f} nats per token (one seed)" in readme
    variants = tables.grouped(lines_of("ablation", steps=281, alpha=2 * 8), name_of)
    stops, never = (tables.compared(variants["AdamW"], variants[f"λ = 0.02{rule}"]) for rule in ("", NEVER))
    assert stops is not None
    assert never is not None
    assert f"ends {_points(stops, ' points')} below AdamW, and without the rule {_points(never)}." in readme


def _points(found, unit=""):
    """A difference in accuracy as the README tells it: over seeds, and in brackets over questions."""
    low, high = (100 * end for end in found.over_questions[1:])
    return f"{tables.percent(found.points)}{unit} ({low:.1f} to {high:.1f})"


def _likelier(found):
    return tables.number(found.nats, 3).removeprefix("-")
