"""The tables of the rates study, given the pilot's own runs: both say the same of them."""

import re

import numpy as np
import pytest

from experiments.studies import pilot, rates, rates_tables
from stable_lora_jax.data import load_jsonl
from stable_lora_jax.finetune.config import options_of
from tests.experiments.test_pilot import RESULTS

METHODS = ("AdamW", "λ = 0.002", "A₀ × 1/4")


@pytest.fixture(scope="module")
def few():
    return pilot.load(RESULTS, "few")


def lines_of(setting, rates, seeds):
    nats = {method: setting.nats(method) for method in METHODS}
    return {
        (method, pilot.RATES[i], seed): {
            "log_p": setting.log_p[method][i, seed],
            "tokens": setting.tokens,
            "held_out_nll": nats[method][i, seed],
            "train": {"method": "stable-lora" if method == "λ = 0.002" else "adamw"},
            "stable_at": {"q": [0, 7 * i + seed]},
        }
        for method in METHODS
        for i in rates
        for seed in seeds
    }


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split("|")]


def rows_of(text: str) -> list[list[str]]:
    return [cells(row) for row in text.splitlines() if row.startswith("| ")][2:]


def test_the_same_runs_are_the_same_on_both_sides(few):
    text = rates_tables.beside_pilot("few", lines_of(few, (0, 2), range(3)), few)
    assert "2376 questions, 3 seeds here" in text
    rows = rows_of(text)
    assert [row[:2] for row in rows] == [[rate, name] for rate in ("6.25e-05", "0.00025") for name in METHODS]
    assert all(row[2] == row[3] and row[4] == row[5] for row in rows)
    assert rows[4][2] == "2.790"
    assert re.fullmatch(r"-0\.42\d ± 0\.0\d\d", rows[4][4])


def test_of_one_seed_the_interval_is_over_questions(few):
    text = rates_tables.beside_pilot("few", lines_of(few, (2,), (1,)), few)
    assert "1 seed here" in text
    _, shrunk, _ = rows_of(text)
    here, there = (float(shrunk[column].split("± ")[1]) for column in (5, 4))
    assert 0 < here < 2 * there


def test_methods_without_every_rate_are_left_out(few):
    lines = lines_of(few, (0, 1), range(3)) | lines_of(few, (2,), range(3))
    del lines["A₀ × 1/4", pilot.RATES[2], 0]
    text, curves = rates_tables.over_rates("few", lines)
    assert list(curves.nats) == ["AdamW", "λ = 0.002"]
    adamw, shrunk = rows_of(text)
    assert adamw[1:5] == ["2.502", "2.736", "3.217", "6.25e-05 (edge)"]
    assert shrunk[1:5] == ["2.529", "2.552", "2.790", "6.25e-05 (edge)"]
    assert (adamw[-1], shrunk[-1]) == ("-", "2 of 6, step 1")  # of three seeds, at the best rate


def test_more_seeds_at_the_best_rates_count_there_alone(few):
    lines = lines_of(few, (0, 1), (0,)) | lines_of(few, (0,), (1, 2))
    text, curves = rates_tables.over_rates("few", lines)
    assert "2376 questions, 1 seed" in text
    assert [row[4].endswith("(3 seeds)") for row in rows_of(text)] == [False, True, True]
    assert all(np.array_equal(curves.nats[name], few.nats(name)[:2, 0]) for name in METHODS)
    grid = rates_tables.grid_of(lines)
    assert grid.seeds == [0]
    for name in METHODS[1:]:
        assert grid.gain(name) == pilot.compared(few, lambda setting, method: setting.log_p[method][0], name)
    del lines["A₀ × 1/4", pilot.RATES[0], 2]
    assert [rates_tables.grid_of(lines).seeds_at_best(name) for name in METHODS[1:]] == [[0, 1, 2], [0, 1]]


def test_a_method_may_have_rates_of_its_own(few):
    """A grid of five and more counts, though none of its rates is AdamW's; one of four is a part of one."""
    lines = lines_of(few, (0, 1), range(3))
    lower = {
        ("lora-plus", rate / 64, seed): {
            "log_p": few.log_p["rate of B × 4"][i, seed],
            "tokens": few.tokens,
            "held_out_nll": few.nats("rate of B × 4")[i, seed],
            "train": {"method": "lora-plus"},
            "stable_at": {"q": [0, 0]},
        }
        for i, rate in enumerate(pilot.RATES)
        for seed in range(3)
    }
    grid = rates_tables.grid_of(lines | lower)
    assert grid.rates == {name: list(pilot.RATES[:2]) for name in METHODS} | {
        "lora-plus": [x / 64 for x in pilot.RATES]
    }
    assert [grid.has_adamws_rates(name) for name in grid.rates] == [True, True, True, False]
    assert grid.of_best("lora-plus") == pilot.RATES[0] / 64
    assert grid.gain("lora-plus") == pilot.compared(
        few, lambda setting, method: setting.log_p[method][0], "rate of B × 4"
    )
    text, curves = rates_tables.over_rates("few", lines | lower)
    row = rows_of(text)[-1]
    assert row[0] == "lora-plus"
    assert row[1:8] == [f"{x:.3f}" for x in few.nats("rate of B × 4").mean(1)] + ["-"] * 2
    assert row[11:13] == ["-"] * 2
    assert curves.rates == grid.rates
    part = {key: line for key, line in lower.items() if key[1] > pilot.RATES[0] / 64}
    assert list(rates_tables.grid_of(lines | part).best) == list(METHODS)


def test_lines_are_told_by_their_methods_names(tmp_path):
    config = rates.RatesConfig(settings=("few",), scales=(16.0,), rates=(1.25e-4,), seeds=1, runs=tmp_path / "runs")
    lines = [{"train": options_of(cell.fingerprint()["train"])} for cell in rates.cells(config)]
    assert [rates_tables.method_of(line) for line in lines] == list(rates.METHODS)


@pytest.mark.parametrize("setting", rates.SETTINGS)
def test_a_settings_files_hold_what_it_trains_on(setting, tmp_path):
    task, count, _ = rates.SETTINGS[setting]
    trained_on, held_out = map(load_jsonl, rates.training_files(setting, task, 321, tmp_path))
    assert len(trained_on) == (count or 2251 - 321)
    assert len(held_out) == 321
    assert not set(trained_on) & set(held_out)


def test_only_its_own_settings_stand_beside_the_pilot(few):
    group = rates_tables.Group("few", 16.0, 500, "float32", "smollm2-135m", "few-0123456789ab")
    np.testing.assert_array_equal(rates_tables.of_pilot(group).tokens, few.tokens)
    others = {"name": "sums", "scale": 2.0, "steps": 499, "model": "smollm2-360m"}
    assert [rates_tables.of_pilot(group._replace(**{name: value})) for name, value in others.items()] == [None] * 4
    for name, (_, steps) in rates_tables.PILOT.items():
        assert steps == rates.SETTINGS[name][2]


def test_nothing_is_told_of_a_single_rate(few):
    assert rates_tables.over_rates("few", lines_of(few, (2,), range(3))) == ("", None)
