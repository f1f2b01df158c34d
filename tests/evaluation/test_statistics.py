"""Intervals and paired tests against SciPy, and against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from stable_lora_jax.evaluation import (
    expected_best,
    holm,
    mean_interval,
    paired_bootstrap,
    paired_p_value,
    seeds_and_questions,
    sign_flip_p_value,
)


def test_the_mean_interval_is_that_of_the_t_test():
    values = np.random.default_rng(0).normal(65, 1.5, 5)
    for level in (0.9, 0.95):
        found = mean_interval(values, level)
        expected = stats.ttest_1samp(values, 0).confidence_interval(level)
        np.testing.assert_allclose(found, (values.mean(), *expected), rtol=1e-12)
    # By hand: mean 2, s = 1, t(0.975, 2) = 4.302653, so the margin is 4.302653 / sqrt(3).
    np.testing.assert_allclose(mean_interval([1, 2, 3]), (2, 2 - 2.484138, 2 + 2.484138), rtol=1e-6)
    assert mean_interval([3.0]) == (3.0, -math.inf, math.inf)


def test_the_t_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(size=4)) for _ in range(2000)]
    assert 0.935 < np.mean([low <= 0 <= high for _, low, high in intervals]) < 0.965  # 0.95 +- 3 standard errors


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_choices(k):
    values = [64.0, 66.5, 61.0, 66.5, 63.0]
    by_hand = np.mean([max(chosen) for chosen in itertools.combinations(values, k)])
    assert expected_best(values, k) == pytest.approx(by_hand, rel=1e-12)


def test_equal_differences_have_no_p_value():
    assert math.isnan(paired_p_value([0.65 - 0.60, 0.70 - 0.65]))  # 0.05 twice, but for the last bits


def test_with_one_seed_the_sign_flip_test_is_mcnemars():
    # 8 questions only the first knows, 2 only the second, 5 both, 3 none.
    first, second = np.array([1] * 8 + [0] * 2 + [1] * 5 + [0] * 3), np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 3)
    by_hand = 2 * sum(math.comb(10, i) for i in range(3)) / 2**10
    assert sign_flip_p_value(first, second) == pytest.approx(by_hand)
    assert sign_flip_p_value(second, first) == pytest.approx(by_hand)
    assert sign_flip_p_value(first, first) == 1.0
    many = np.array([1] * 600 + [0] * 500)
    assert sign_flip_p_value(many, 1 - many) == pytest.approx(stats.binomtest(600, 1100).pvalue, rel=1e-9)


def test_with_several_seeds_the_sign_flip_test_weighs_by_how_many_differ():
    # Three questions on which one seed of two is better, one on which both are worse: 1/2 + 1/2 + 1/2 - 1 = 1/2.
    first, second = np.array([[1, 1, 1, 0], [0, 0, 0, 0]]), np.array([[0, 0, 0, 1], [0, 0, 0, 1]])
    sums = [abs(sum(s * d for s, d in zip(signs, (1, 1, 1, 2), strict=True))) for signs in
            itertools.product((1, -1), repeat=4)]  # fmt: skip
    assert sign_flip_p_value(first, second) == pytest.approx(np.mean(np.array(sums) >= 1))
    # The same scores of more seeds, and of another number on both sides.
    assert sign_flip_p_value(np.tile(first, (3, 1)), second) == pytest.approx(np.mean(np.array(sums) >= 1))


def test_ties_of_thirds_count_as_reached():
    # One seed of three, twice, against two of three: +1 +1 -2 is 0, and all eight signs reach that.
    first, second = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]]), np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]])
    assert sign_flip_p_value(first, second) == 1.0
    # +1 +1 and +2 less 0: the sums 4, 0, 0 and their like; 4 is reached by two signs of eight.
    assert sign_flip_p_value(first + second, np.zeros((3, 3))) == pytest.approx(2 / 8)


def test_bootstrap_interval_agrees_with_the_normal_one_for_many_questions():
    rng = np.random.default_rng(2)
    first, second = rng.random((3, 2000)) < 0.7, rng.random((3, 2000)) < 0.65
    difference = (first.mean(0) - second.mean(0)).astype(float)
    error = difference.std() / math.sqrt(2000)
    found = paired_bootstrap(first, second)
    assert found.value == pytest.approx(difference.mean())
    np.testing.assert_allclose([found.low, found.high], found.value + np.array([-1.96, 1.96]) * error, atol=error / 10)
    assert paired_bootstrap(first, second) == found  # seeded
    assert paired_bootstrap(first, first) == (0, 0, 0)


def test_pairing_takes_out_how_hard_questions_are():
    rng = np.random.default_rng(3)
    hard = rng.random(1000) < 0.5
    first, second = hard * 1.0, np.where(rng.random(1000) < 0.02, 1 - hard, hard)
    paired = paired_bootstrap(first, second)
    unpaired = math.sqrt(first.var() / 1000 + second.var() / 1000) * 1.96
    assert (paired.high - paired.low) / 2 < unpaired / 3


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: mean_interval([]), r"shape \(0,\).*at least one number"),
        (lambda: mean_interval([1.0, 2.0], 95), r"level=95 is not in \(0, 1\)"),
        (lambda: expected_best([1.0, 2.0], 3), r"k=3 is not in \[1, 2\].*more seeds"),
        (lambda: paired_bootstrap([1, 0, 1], [1, 0]), r"of 3 and 2 questions.*same questions"),
        (lambda: seeds_and_questions(np.zeros(3)), r"have shape \(3,\); \(seeds, questions\)"),
        (lambda: seeds_and_questions(np.zeros((2, 3)), [1.0, 2.0]), r"weights of shape \(2,\) for differences"),
        (lambda: sign_flip_p_value([1], [0]), r"of 1 and 1 questions.*at least two"),
        (lambda: sign_flip_p_value([0.5, 1], [0, 1]), "neither 0 nor 1"),
    ],
)
def test_errors(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_both_sources_by_hand_and_of_one_seed_the_questions_alone():
    # By seed 0 and 2, mean 1: 2 / 2. By question -1 and 3: 8 / 2. Their sum is 5.
    found, p = seeds_and_questions(np.array([[-2.0, 2.0], [0.0, 4.0]]))
    assert (found.value, found.high) == pytest.approx((1, 1 + stats.norm.ppf(0.975) * math.sqrt(5)))
    assert p == pytest.approx(2 * stats.norm.sf(1 / math.sqrt(5)))
    one = np.random.default_rng(0).normal(0.1, 1, (1, 500))
    found, p = seeds_and_questions(one)
    assert p == pytest.approx(stats.ttest_1samp(one[0], 0).pvalue, rel=0.01)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * one.std(ddof=1) / math.sqrt(500), rel=1e-3)
    # Weights only say how questions count: of weight 2 with twice the difference, the same.
    heavy = seeds_and_questions(2 * one, np.full(500, 2.0))
    np.testing.assert_allclose([*heavy[0], heavy[1]], [*found, p])
    assert math.isnan(seeds_and_questions(np.ones((2, 3)))[1])


def test_the_paired_p_value_by_hand():
    # Mean 2, s = 1, so t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    assert paired_p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)
    assert paired_p_value([-1.0, -2.0, -3.0]) == paired_p_value([1.0, 2.0, 3.0])
    assert math.isnan(paired_p_value([1.0]))
    assert math.isnan(paired_p_value([2.0, 2.0]))


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.9 * 1; never below the one before, never above 1.
    np.testing.assert_allclose(holm([0.03, 0.01, math.nan, 0.9, 0.02]), [0.06, 0.04, math.nan, 0.9, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
