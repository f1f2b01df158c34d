"""Means with intervals, and paired comparisons: what a table of several seeds and questions may say.

Two sources of chance are kept apart. Seeds: `mean_interval` of one accuracy per seed says how far another seed may be,
and `paired_p_value` whether others would rank two methods alike. Questions: `paired_bootstrap` and `sign_flip_p_value`
keep the trained models as they are and ask whether other questions of the same kind would rank them alike;
`seeds_and_questions` asks for both at once. Two methods answer the same questions, so all of these compare them
question by question, which takes out that some questions are harder than others.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Numbers: TypeAlias = Sequence[float] | np.ndarray


class Estimate(NamedTuple):
    """A value with the lower and the upper end of its interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Numbers, level: float = 0.95) -> Estimate:
    """Returns the mean of independent values, one per seed, with Student's t interval; unbounded for a single value.

    Args:
      values: at least one.
      level: probability that the interval covers the true mean, in (0, 1).

    Raises:
      ValueError: no value, or a level out of range.

    Examples:
      >>> print("{:.2f}, {:.2f} to {:.2f}".format(*mean_interval([1.0, 2.0, 3.0])))
      2.00, -0.48 to 4.48
    """
    from scipy import stats  # here and below: its import takes a second of every command's start

    numbers = _some(values)
    _check_level(level)
    mean, count = float(numbers.mean()), len(numbers)
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    margin = float(stats.t.ppf((1 + level) / 2, count - 1) * numbers.std(ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - margin, mean + margin)


def paired_p_value(differences: Numbers) -> float:
    """Returns the two-sided p value of a paired t test of "no difference"; NaN where the differences have no spread.

    Args:
      differences: at least one, e.g. of two methods' accuracies with the same seed.

    Raises:
      ValueError: no difference.
    """
    from scipy import stats

    numbers = np.round(_some(differences), 9)  # equal differences of other numbers differ by rounding
    return float(np.asarray(stats.ttest_1samp(numbers, 0))[1]) if np.ptp(numbers) > 0 else math.nan


def holm(p_values: Numbers) -> list[float]:
    """Returns p values that are corrected for how many there are, by Holm's method; NaN stays and does not count.

    Args:
      p_values: in [0, 1] or NaN.

    Examples:
      >>> holm([0.04, 0.01, 0.3])
      [0.08, 0.03, 0.3]
    """
    numbers = np.asarray(p_values, float)
    order = [int(i) for i in np.argsort(numbers) if not np.isnan(numbers[i])]
    adjusted, largest = numbers.copy(), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, float(numbers[index]) * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted.tolist()


def expected_best(values: Numbers, k: int) -> float:
    """Returns the mean, over all choices of k of the values, of the largest: what "best of k seeds" reports.

    Args:
      values: at least k, one per seed.
      k: at least 1; 1 gives the mean, the number of values their maximum.

    Raises:
      ValueError: k is not in [1, number of values].

    Examples:
      >>> print(f"{expected_best([60.0, 61.0, 65.0], 2):.2f}")
      63.67
    """
    numbers = np.sort(_some(values))
    if not 1 <= k <= len(numbers):
        raise ValueError(f"k={k} is not in [1, {len(numbers)}], the number of values. Choose fewer, or run more seeds.")
    # The i-th smallest is the largest of those choices that take the other k - 1 from the i below it.
    weights = [math.comb(i, k - 1) / math.comb(len(numbers), k) for i in range(len(numbers))]
    return float(numbers @ np.array(weights))


def paired_bootstrap(
    first: Numbers, second: Numbers, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Returns the mean difference first - second with a bootstrap interval over the questions.

    Args:
      first: scores, (questions,) or (seeds, questions); seeds are averaged.
      second: scores of the same questions; the number of seeds may be another.
      level: probability that the interval covers the true difference, in (0, 1).
      resamples: draws of as many questions, with replacement.
      seed: of the draws.

    Raises:
      ValueError: not the same number of questions, fewer than two, or a level out of range.
    """
    from scipy import stats

    difference = _difference(first, second)
    _check_level(level)
    if np.ptp(difference) == 0:  # nothing to resample: every draw has the same mean
        return Estimate(*[float(difference[0])] * 3)
    found = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Estimate(float(difference.mean()), float(low), float(high))


def sign_flip_p_value(first: Numbers, second: Numbers) -> float:
    """Returns the two-sided p value, over questions, of "no difference": every question's may as well be its opposite.

    The permutation test of the mean difference, exact: a question on which many seeds differ weighs more. With one seed
    it is McNemar's test.

    Args:
      first: right (1) or wrong (0), (questions,) or (seeds, questions).
      second: the same questions'; the number of seeds may be another.

    Raises:
      ValueError: not the same number of questions, fewer than two, or scores that are neither 0 nor 1.
    """
    _difference(first, second)
    ours, theirs = (np.atleast_2d(np.asarray(scores, float)) for scores in (first, second))
    if not (np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all()):
        raise ValueError("Some scores are neither 0 nor 1. This test is of right and wrong answers.")
    # In whole numbers, so that sums which are equal are seen to be.
    common = math.gcd(len(ours), len(theirs))
    difference = len(theirs) // common * ours.sum(0) - len(ours) // common * theirs.sum(0)
    total = int(np.abs(difference).sum())
    chance = np.ones(1)  # of each sum from -total to total
    for each in np.abs(difference).astype(int):
        chance = (np.pad(chance, (0, 2 * each)) + np.pad(chance, (2 * each, 0))) / 2
    reached = np.abs(np.arange(-total, total + 1)) >= abs(difference.sum())
    return min(1.0, float(chance[reached].sum()))


def _difference(first: Numbers, second: Numbers) -> np.ndarray:
    """Returns first - second for every question, averaged over seeds."""
    means = [np.atleast_2d(np.asarray(scores, float)).mean(0) for scores in (first, second)]
    if len(means[0]) != len(means[1]) or len(means[0]) < 2:
        raise ValueError(
            f"The scores are of {len(means[0])} and {len(means[1])} questions. A paired comparison needs the same "
            "questions in the same order on both sides, at least two."
        )
    return means[0] - means[1]


def seeds_and_questions(
    differences: np.ndarray, weights: Numbers | None = None, level: float = 0.95
) -> tuple[Estimate, float]:
    """Returns the mean difference, with an interval for other seeds and other questions, and its two-sided p value.

    The variances of both sources are added, each as that of a mean; with weights the questions' is that of a ratio of
    sums. Interval and p value are the normal's, which with two or three seeds is a little narrow. One seed has no
    spread: then both are over the questions alone. NaN is the p value where nothing varies.

    Args:
      differences: of two methods with the same seeds and questions, (seeds, questions).
      weights: of the questions; the mean is the sum of the differences over that of the weights, as for log p and
        tokens. All 1 if None.
      level: probability that the interval covers the true mean, in (0, 1).

    Raises:
      ValueError: fewer than two questions, another number of weights, or a level out of range.
    """
    from scipy import stats

    _check_level(level)
    if differences.ndim != 2 or differences.shape[1] < 2:
        raise ValueError(
            f"differences have shape {differences.shape}; (seeds, questions) with at least two questions is allowed. "
            "Give a row for each seed, also of a single one."
        )
    scale = np.ones(differences.shape[1]) if weights is None else np.asarray(weights, float)
    if scale.shape != differences.shape[1:]:
        raise ValueError(
            f"there are weights of shape {scale.shape} for differences of shape {differences.shape}. Give one per "
            "question, the same for all seeds."
        )
    by_seed = differences.sum(1) / scale.sum()
    value = float(by_seed.mean())
    residual = differences.mean(0) - value * scale
    questions = len(scale) * residual.var(ddof=1) / scale.sum() ** 2
    seeds = by_seed.var(ddof=1) / len(by_seed) if len(by_seed) > 1 else 0.0
    error = math.sqrt(float(questions + seeds))
    if error == 0:
        return Estimate(value, value, value), math.nan
    margin = float(stats.norm.ppf((1 + level) / 2)) * error
    return Estimate(value, value - margin, value + margin), float(2 * stats.norm.sf(abs(value) / error))


def _some(values: Numbers) -> np.ndarray:
    numbers = np.asarray(values, float)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"Got values of shape {numbers.shape}. Give a list of at least one number, one per seed.")
    return numbers


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not in (0, 1). 0.95 gives the usual interval.")
