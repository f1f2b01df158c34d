"""Exact match on real problems of GSM8K, as the smoke test of the experiment reads them."""

import json
import re

import numpy as np
import pytest

from experiments.running.cells import append
from experiments.running.provenance import provenance
from experiments.studies.cot import GSM8K, CotConfig, as_file, cells, report
from stable_lora_jax.data import Completion, load_jsonl
from stable_lora_jax.evaluation import exact_match

# What the last lines of the ten solutions say, read by hand.
NUMBERS = (4, 71, 18, 120, 3, 109_200_000, 2000, 2000, -47, -3)


def test_real_answers_match_however_they_are_written(tmp_path):
    problems = [item for item in load_jsonl(as_file(str(GSM8K), "test", tmp_path)) if isinstance(item, Completion)]
    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert [(f"Question: {line['question']}\nAnswer:", f" {line['answer']}") for line in lines] == [
        (item.prompt, item.completion) for item in problems
    ]
    solutions = [item.completion for item in problems]
    written = {
        "plain": "#### {}",
        "cents": "#### {}.00",
        "commas": "The answer is: {:,}",
        "dollars": "So it is ${:,}.00.",
    }
    for solution, number in zip(solutions, NUMBERS, strict=True):
        assert exact_match(solution, solution)
        for name, form in written.items():
            if name != "dollars" or number > 0:
                assert exact_match(form.format(number), solution), (name, number)
            assert not exact_match(form.format(number + 1), solution), (name, number)
            assert not exact_match(form.format(10 * number), solution), (name, number)
    assert sum("," in solution.split("####")[1] for solution in solutions) == 3


@pytest.mark.parametrize("text", ["", "I do not know.", "####", "#### 2,000.01", "#### 2000/3"])
def test_no_number_or_another_one_is_wrong(text):
    solution = "Thus, the $20,000 system costs $20,000/10 = $<<20000/10=2000>>2,000 per vent.\n#### 2,000"
    assert not exact_match(text, solution)
    assert not exact_match("2,000", "a solution without a number")


def test_nats_are_compared_over_seeds_and_problems(tmp_path):
    rng, problems = np.random.default_rng(0), 200
    tokens = rng.integers(20, 200, problems)
    config = CotConfig(
        train=str(GSM8K), test=str(GSM8K), lengths=(4,), seeds=1, results=tmp_path, runs=tmp_path / "runs" / "cells"
    )
    log_p = {"adamw": -tokens * rng.uniform(0.5, 1.5, problems)}
    log_p["stable-lora"] = log_p["adamw"] + tokens * rng.normal(0.02, 0.1, problems)
    for cell in cells(config):
        mine = log_p[cell.train.method.name]
        scores = {"steps": 4, "accuracy_token": 0.5, "correct_token": "01" * (problems // 2), "questions": problems}
        scores |= {"nll_token": -mine.sum() / tokens.sum(), "log_p": mine.tolist(), "tokens": tokens.tolist()}
        seconds = {"train_seconds": 1.0, "score_seconds": 1.0, "stable_at": {}}
        append(tmp_path / "cot.jsonl", {"key": cell.key} | cell.fingerprint() | scores | seconds | provenance())
    (row,) = (line for line in report(tmp_path).splitlines() if line.startswith("| 4 | stable-lora |"))
    (adamw,) = (line for line in report(tmp_path).splitlines() if line.startswith("| 4 | adamw |"))
    assert adamw.endswith("| - | - |")
    found = re.search(r"\| ([+-]\d\.\d+) ± (\d\.\d+) \| (<?\d\.\d+) \|$", row)
    assert found, row
    difference, drawn = log_p["adamw"] - log_p["stable-lora"], rng.integers(0, problems, (4000, problems))
    bootstrap = difference[drawn].sum(1) / tokens[drawn].sum(1)
    assert float(found[1]) == pytest.approx(difference.sum() / tokens.sum(), abs=6e-4)
    assert float(found[2]) == pytest.approx(1.96 * bootstrap.std(), rel=0.1)
