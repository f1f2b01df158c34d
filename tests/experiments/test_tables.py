"""What a table says, against lines and numbers worked out by hand."""

import numpy as np
import pytest

from experiments import tables, theory


def line(method: str, seed: int, bits: str, **train) -> dict:
    train = {"data": "arc_easy", "method": method, "seed": seed, "lam": 0.1} | train
    share = bits.count("1") / len(bits)
    scores = {"accuracy_token": share, "nll_token": 1 - share, "correct_token": bits, "stable_at": {"q": [0, 3]}}
    return {"key": f"{method}-{seed}", "train": train, "score_on": "test"} | scores


ADAMW = [line("adamw", seed, bits) for seed, bits in enumerate(("0000011111", "0000001111", "0000011110"))]
STABLE = [line("stable-lora", seed, bits) for seed, bits in enumerate(("1000011111", "1100011111", "1000011111"))]


def test_a_row_of_scores():
    rows = tables.scored({"adamw": ADAMW, "stable-lora": STABLE, "alone": ADAMW[:1]}, lambda name: "adamw")
    assert dict(zip(tables.SCORES[:4], rows["adamw"][:4], strict=True)) == {
        "seeds": "3",
        "accuracy, %": "43.3 ± 14.3",  # 50, 40 and 40: standard error 3.33, t = 4.303
        "best of 3": "50.0",
        "nats a token": "0.567 ± 0.143",
    }
    assert rows["adamw"][4:] == ["-"] * 6  # nothing to compare with, nothing that shrinks
    seeds, accuracy, best, _, difference, p_seeds, interval, counts, p_questions, stable = rows["stable-lora"]
    assert (seeds, accuracy, best) == ("3", "63.3 ± 14.3", "70.0")
    assert difference == "20.0 ± 24.8"  # 10, 30 and 20: standard error 5.77
    assert p_seeds == "0.074"  # t = 3.464 with 2 degrees of freedom, and no other comparison that has a p value
    low, high = (float(end) for end in interval.split(" to "))
    assert low <= 20 <= high
    # Better on questions 0, 1, 5 and 9, worse on none: 2 / 16; the other comparison's 1.0 doubles it.
    assert (counts, p_questions) == ("4 : 0", "0.250")
    assert stable == "3 of 6, step 3"
    assert rows["alone"][4:9] == ["0.0 (one seed)", "-", "+0.0 to +0.0", "0 : 0", "1.000"]


def test_failed_cells_are_counted_and_left_out():
    records = [*STABLE, {"train": {}, "failed": "Step 3"}]
    assert tables.grouped(records, lambda record: 0) == {0: STABLE}
    assert tables.failures(records) == "1 of 4 cells became infinite and are left out.\n"


def test_lines_of_two_settings_are_never_one_mean():
    other = line("stable-lora", 1, "1111111111", model="a larger one")
    assert tables.setting(other, "method") != tables.setting(STABLE[1], "method")
    assert tables.setting(ADAMW[0], "method") == tables.setting(STABLE[1], "method")
    with pytest.raises(ValueError, match="stable-lora-1 and stable-lora-1 have one seed and other values"):
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
