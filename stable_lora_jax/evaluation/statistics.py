"""Means with intervals, and paired comparisons: what a table of several seeds and questions may say.

Two sources of chance are kept apart. Seeds: `mean_interval` of one accuracy a seed says how far another seed may be,
and `paired_p_value` whether others would rank two methods alike. Questions: `paired_bootstrap` and `sign_flip_p_value`
keep the trained models as they are and ask whether other questions of the same kind would rank them alike. Two methods
answer the same questions, so both compare them question by question, which takes out that some questions are harder
than others.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import stats

Numbers: TypeAlias = Sequence[float] | np.ndarray


class Estimate(NamedTuple):
    """A value with the lower and the upper end of its interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Numbers, level: float = 0.95) -> Estimate:
    """Returns the mean of independent values, one a seed, with Student's t interval; unbounded for a single value.

    Args:
      values: at least one.
      level: probability that the interval covers the true mean, in (0, 1).

    Raises:
      ValueError: no value, or a level out of range.

    Example:
      >>> print("{:.2f}, {:.2f} to {:.2f}".format(*mean_interval([1.0, 2.0, 3.0])))
      2.00, -0.48 to 4.48
    """
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
    numbers = np.round(_some(differences), 9)  # equal differences of other numbers differ by rounding
    return float(np.asarray(stats.ttest_1samp(numbers, 0))[1]) if np.ptp(numbers) > 0 else math.nan


def holm(p_values: Numbers) -> list[float]:
    """Returns p values that are corrected for how many there are, by Holm's method; NaN stays and does not count.

    Args:
      p_values: in [0, 1] or NaN.

    Example:
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
      values: at least k, one a seed.
      k: at least 1; 1 gives the mean, the number of values their maximum.

    Raises:
      ValueError: k is not in [1, number of values].

    Example:
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


def sign_flip_p_value(first: Numbers, second: Numbers, *, resamples: int = 9_999, seed: int = 0) -> float:
    """Returns the two-sided p value, over questions, of "no difference": every question's may as well be its opposite.

    A permutation test of the mean difference, so a question on which many seeds differ weighs more. With one seed of
    right (1) and wrong (0) answers it is McNemar's test. Exact where few questions differ, else by draws, which
    resolve no less than 1 / (resamples + 1).

    Args:
      first: scores, (questions,) or (seeds, questions); seeds are averaged.
      second: scores of the same questions; the number of seeds may be another.
      resamples: draws of a sign for every question.
      seed: of the draws.

    Raises:
      ValueError: not the same number of questions, or fewer than two.
    """
    difference = np.round(_difference(first, second), 9)  # means of other numbers of seeds may differ by rounding
    difference = difference[difference != 0]  # a sign changes nothing there
    if len(difference) < 2:
        return 1.0
    found = stats.permutation_test(
        (difference,),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        n_resamples=resamples,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _difference(first: Numbers, second: Numbers) -> np.ndarray:
    """Returns first - second for every question, averaged over seeds."""
    means = [np.atleast_2d(np.asarray(scores, float)).mean(0) for scores in (first, second)]
    if len(means[0]) != len(means[1]) or len(means[0]) < 2:
        raise ValueError(
            f"The scores are of {len(means[0])} and {len(means[1])} questions. A paired comparison needs the same "
            "questions in the same order on both sides, at least two."
        )
    return means[0] - means[1]


def _some(values: Numbers) -> np.ndarray:
    numbers = np.asarray(values, float)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"Got values of shape {numbers.shape}. Give a list of at least one number, one a seed.")
    return numbers


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not in (0, 1). 0.95 gives the usual interval.")
