"""Valleys of curves whose edges are known, and their intervals where chance moves an edge."""

import numpy as np
import pytest

from experiments.studies import valley

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)


def found(nats, rates=RATES, noise=0.0, seeds=2):
    """The valley of a curve, of 400 questions with 3 tokens each."""
    tokens, rng = np.full(400, 3.0), np.random.default_rng(0)
    log_p = -np.array(nats)[:, None, None] * tokens + rng.normal(0, noise, (len(nats), seeds, 400))
    return valley.valley(log_p, tokens, rates)


def test_an_edge_lies_on_the_chord_between_two_rates():
    # 0.2 nats per octave on the left of 4e-4, 0.1 on the right: edges a quarter and half an octave away.
    v = found([1.4, 1.2, 1.0, 1.1, 1.2])
    assert v.low == pytest.approx(4e-4 * 2**-0.25)
    assert v.high == pytest.approx(4e-4 * 2**0.5)
    assert v.octaves == pytest.approx((0.75, 0.75, 0.75))
    assert str(v) == "0.00034 to 0.00057: 0.8 (0.8 to 0.8)"


def test_a_valley_may_go_on_outside_the_grid():
    v = found([1.03, 1.02, 1.0, 1.02, 1.2])
    assert (pytest.approx(v.low), v.open_low, v.open_high) == (RATES[0], True, False)
    assert str(v).startswith("≤ 0.0001 to 0.0009: ≥ 3.2 (")
    v = found([1.5, 1.25, 1.0, 1.02, 1.04])
    assert (pytest.approx(v.high), v.open_low, v.open_high) == (RATES[-1], False, True)
    assert " to ≥ 0.0016: ≥ 2.2 (" in str(v)


def test_a_second_valley_behind_a_hill_does_not_count():
    v = found([1.0, 1.2, 1.02, 1.2, 1.02])
    assert v.high == pytest.approx(1e-4 * 2**0.25)
    assert (v.open_low, v.open_high) == (True, False)
    v = found([1.4, 1.02, 1.2, 1.0, 1.2])
    assert v.low == pytest.approx(8e-4 * 2**-0.25)


def test_rates_need_no_even_steps():
    v = found([1.2, 1.0, 1.4], rates=(1e-4, 4e-4, 6.4e-3))
    assert v.low == pytest.approx(4e-4 * 2**-0.5)
    assert v.high == pytest.approx(4e-4 * 2**0.5)


def test_the_interval_tells_what_chance_moves():
    # Beside 4e-4 the curve is 0.05 above its least, by chance a little more or less, and 0.06 above beyond.
    v = found([1.4, 1.25, 1.0, 1.05, 1.06], noise=1.0)
    assert v.octaves.low < 1.25 < v.octaves.high
    assert v.octaves.high - v.octaves.low > 0.3
    still = found([1.4, 1.25, 1.0, 1.05, 1.06], noise=0.01)
    assert still.octaves.high - still.octaves.low < v.octaves.high - v.octaves.low
