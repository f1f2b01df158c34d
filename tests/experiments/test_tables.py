"""What a table says, against lines and numbers worked out by hand."""

import numpy as np
import pytest

from experiments.running import tables
from experiments.running.cells import append, as_written
from experiments.studies import qa_tables, theory
from stable_lora_jax.finetune import numbers_of


def line(method: str, seed: int, bits: str, **train) -> dict:
    train = numbers_of(method, {"data": "arc_easy", "method": method, "seed": seed, "lam": 0.1} | train)
    share = bits.count("1") / len(bits)
    scores = {"accuracy_token": share, "nll_token": 1 - share, "correct_token": bits, "stable_at": {"q": [0, 3]}}
    scores["accuracy_sum"] = share / 2
    return {"key": f"{method}-{seed}", "train": train, "score_on": "test"} | scores


ADAMW = [line("adamw", seed, bits) for seed, bits in enumerate(("0000011111", "0000001111", "0000011110"))]
STABLE = [line("stable-lora", seed, bits) for seed, bits in enumerate(("1000011111", "1100011111", "1000011111"))]


def test_a_row_of_scores():
    rows = tables.scored({"adamw": ADAMW, "stable-lora": STABLE, "alone": ADAMW[:1]}, lambda name: "adamw")
    # 50, 40 and 40: standard error 3.33, t = 4.303. Nothing to compare with, nothing that shrinks.
    first = ["3", "43.3 ± 14.3", "21.7 ± 7.2", "50.0", *("-",) * 4, "0.567 ± 0.143", *("-",) * 3]
    assert rows["adamw"] == first
    assert len(first) == len(tables.SCORES)
    seeds, accuracy, _, best, difference, p_seeds, interval, p_questions, *rest = rows["stable-lora"]
    assert (seeds, accuracy, best) == ("3", "63.3 ± 14.3", "70.0")
    assert difference == "20.0 ± 24.8"  # 10, 30 and 20: standard error 5.77
    assert p_seeds == "0.074"  # t = 3.464 with 2 degrees of freedom, and no other comparison that has a p value
    low, high = (float(end) for end in interval.split(" to "))
    assert low <= 20 <= high
    # Better on questions 0, 1, 5 and 9, worse on none: 2 / 16; the other comparison's 1.0 doubles it.
    assert p_questions == "0.250"
    assert rest == ["0.367 ± 0.143", "-0.200 ± 0.248", "0.074", "3 of 6, step 3"]
    assert rows["alone"][4:8] == ["0.0 (one seed)", "-", "+0.0 to +0.0", "1.000"]
    assert rows["alone"][9:11] == ["0.000 (one seed)", "-"]


def test_runs_that_came_out_the_same_are_one_comparison():
    # Stable-LoRA's p value over questions is 2 / 16 beside one other comparison: doubled, and not three times that.
    groups = {"adamw": ADAMW, "stable-lora": STABLE, "again": STABLE, "alone": ADAMW[:1]}
    rows = tables.scored(groups, lambda name: "adamw")
    assert rows["again"] == rows["stable-lora"]
    assert rows["stable-lora"][7] == "0.250"


def test_what_shrinks_on_has_its_steps_in_brackets():
    on = [line("stable-lora", 0, "01", stop_when_stable=False), line("stable-lora", 1, "01", stop_when_stable=False)]
    assert tables.stable_share(on) == "(2 of 4, step 3)"
    assert tables.stable_share(STABLE[:2]) == "2 of 4, step 3"


def test_what_was_not_measured_is_a_dash():
    without = [{k: v for k, v in each.items() if k not in ("nll_token", "accuracy_sum")} for each in (*ADAMW, *STABLE)]
    row = tables.scored({"adamw": without[:3], "stable-lora": without[3:]}, lambda name: "adamw")["stable-lora"]
    assert (row[1], row[2], row[8:11]) == ("63.3 ± 14.3", "-", ["-"] * 3)


def test_failed_cells_are_counted_and_left_out():
    records = [*STABLE, {"train": {}, "failed": "Step 3"}]
    assert tables.grouped(records, lambda record: 0) == {0: STABLE}
    assert tables.failures(records) == "1 of 4 cells became infinite and are left out.\n"


def test_lines_of_two_settings_are_never_one_mean():
    other = line("stable-lora", 1, "1111111111", model="a larger one")
    assert tables.setting(other, *tables.OF_METHODS) != tables.setting(STABLE[1], *tables.OF_METHODS)
    assert tables.setting(ADAMW[0], *tables.OF_METHODS) == tables.setting(STABLE[1], *tables.OF_METHODS)
    # A line from before an option existed did what is today's default.
    assert tables.setting(line("adamw", 0, "01", use_rslora=False)) == tables.setting(line("adamw", 0, "01"))
    with pytest.raises(ValueError, match="stable-lora-1 and stable-lora-1 have the same seed and different settings"):
        tables.scored({"stable-lora": [*STABLE, other]}, lambda name: "adamw")


def test_exponents_of_power_laws():
    exponents = dict(zip(theory.NAMES, (0.5, -1.0, 0.0, 2.0, -0.25, 1.0), strict=True))
    lines = [
        {"seed": seed, "width": width, "sizes": {"9": [(1 + seed) * width**gamma for gamma in exponents.values()]}}
        for seed in range(3)
        for width in (64, 256, 1024)
    ]
    for name, found in theory.exponents(lines, "9").items():
        np.testing.assert_allclose(found, exponents[name], atol=1e-9)


def test_predictions_of_the_theorem():
    # Before A₀ is erased, γ[A Z] = max(0, 1 - c) and δ₁ has γ[s] + γ[η] + γ[A Z]; section 3 of arXiv 2603.05204.
    assert theory.predicted(1.5, "adamw") == {"A Z": 0, "B": -1.5, "δ₁": 0.5, "δ₂": 0, "δ₃": 0, "ΔY": 0.5}
    assert theory.predicted(1.5, "stable-lora")["ΔY"] == theory.predicted(0.5, "adamw")["ΔY"] == 0


def test_a_table_of_methods_says_what_a_number_is_worth(tmp_path):
    common = {"model": "tiny", "dtype": "float32", "rank": 2, "learning_rate": 2e-3, "alpha": 4.0}
    fields = {"questions": 10, "steps": 4, "commit": "abc", "machine": {"cpu": "Xeon"}}

    def write(name, method, seed, bits, **train):
        made = line(method, seed, bits, **common | {"batch_size": 4} | train) | fields
        if name == "qa_search":
            made |= {"score_on": "holdout", "machine": {"cpu": "EPYC"}}
        append(tmp_path / f"{name}.jsonl", as_written(made))

    for rate, bits in ((1e-3, "1110000000"), (2e-3, "1111000000")):
        write("qa_search", "adamw", 100, bits, learning_rate=rate, holdout=4)
    for seed in range(2):
        write("qa", "adamw", seed, "1111000000")
        write("qa", "stable-lora", seed, "1111110000", learning_rate=1e-3, lam=0.1)
        write("qa_controls", "adamw", seed, "1111100000", learning_rate=1e-3)
    base = {"accuracy_token": 0.25, "accuracy_sum": 0.5, "nll_token": 3.0}
    known = {"data": "arc_easy", "score_on": "test", "model": "tiny", "dtype": "float32"}
    append(tmp_path / "qa_references.jsonl", known | {"base": base, "longest_answer": 0.4})
    told = qa_tables.report(tmp_path)
    assert "| adamw | 0.002*, 2, - | 2 | 40.0 ± 0.0 | 20.0 ± 0.0 | - |" in told  # at the end of what was searched
    assert "| searched | s = 2, η = 0.001 | s = 2, η = 0.002 |" in told
    assert "| adamw | 30.0, 0.70 | 40.0, 0.60 |" in told
    assert "| stable-lora | 0.001, 2, 0.1 | 2 | 60.0 ± 0.0 | 30.0 ± 0.0 | - | 20.0 ± 0.0 | - |" in told
    assert "Before training: 25.0 %, summed 50.0 %, 3.000 nats per token." in told
    assert "the most characters: 40.0 %." in told
    assert "AdamW at Stable-LoRA's η = 0.001 and s = 2: 50.0 ± 0.0 %, 0.500 ± 0.000 nats per token." in told
    assert "Stable-LoRA minus that: 10.0 ± 0.0 points, -0.100 ± 0.000 nats" in told
    assert "Measured on Xeon at abc (adamw, stable-lora, AdamW at Stable-LoRA's η and s); on EPYC at abc (the " in told
