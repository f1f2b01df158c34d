"""Exact match on real problems of GSM8K, as the smoke test of the experiment reads them."""

import json

import pytest

from experiments.studies.cot import GSM8K, as_file
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
