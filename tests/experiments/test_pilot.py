"""The pilot's tables against an analysis made independently of them, and intervals against a simulation."""

from pathlib import Path

import numpy as np
import pytest

from experiments.studies import pilot

RESULTS = Path(__file__).parent.parent.parent / "experiments" / "results"


@pytest.fixture(scope="module")
def few():
    return pilot.load(RESULTS, "few")


def test_the_curves(few):
    np.testing.assert_allclose(few.nats("AdamW").mean(1), [2.5022, 2.7365, 3.2173, 3.7530, 3.8761], atol=5e-5)
    np.testing.assert_allclose(few.nats("λ = 0.005").mean(1), [2.7230, 2.5211, 2.7847, 3.4476, 3.8080], atol=5e-5)
    accuracy = 100 * few.correct["rate of B × 1/4"].mean((1, 2))
    np.testing.assert_allclose(accuracy, [64.5, 65.2, 65.1, 63.7, 60.6], atol=0.051)
    while_it_trains = few.nats(pilot.EARLY).mean(1).reshape(len(pilot.LENGTHS), len(pilot.RATES))
    np.testing.assert_allclose(while_it_trains[0], [2.5145, 2.4781, 2.4941, 2.5544, 2.6655], atol=5e-5)
    np.testing.assert_array_equal(while_it_trains[-1], few.nats("AdamW").mean(1))


@pytest.mark.parametrize(
    ("method", "value", "margin"),
    [("λ = 0.0005", -0.0126, 0.0033), ("A₀ × 1/4", -0.0303, 0.0087), (pilot.EARLY, -0.0330, 0.0071)],
)
def test_differences_at_the_best_rate(few, method, value, margin):
    found, _ = pilot.compared(few, pilot.at_best_rate, method)
    assert found.value == pytest.approx(value, abs=1e-4)
    # There the questions' error is a bootstrap's, here a ratio's of sums.
    assert (found.high - found.low) / 2 == pytest.approx(margin, rel=0.1)


def test_an_interval_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    tokens = rng.integers(1, 9, 400).astype(float)
    for _ in range(200):
        hard, seeds = rng.normal(0, 0.5, 400), rng.normal(0, 0.02, (3, 1))
        moved = tokens * (0.1 + seeds) + tokens * hard * 0.3 + rng.normal(0, 0.1, (3, 400))
        log_p = {"AdamW": np.zeros((1, 3, 400)) + moved, "other": np.zeros((1, 3, 400))}
        found, _ = pilot.compared(pilot.Setting(log_p, tokens, {}), pilot.over_rates, "other")
        covered += found.low <= 0.1 <= found.high
    assert 0.85 <= covered / 200 <= 1  # the normal's 95 % is a little short with three seeds
