"""How wide the valley of a curve over learning rates is: from which rate to which it is near its own best.

Between the rates of the grid the curve is taken as straight over log η. A convex curve lies below its chords, so a
coarse grid puts the edges too far in, and its least too high, which puts them further out. A count of the good rates
jumps by one, and does not tell where they lie.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stable_lora_jax.evaluation import Estimate

WIDE = 0.05  # nats per token above a method's best that still count as good
_RESAMPLES = 1000
GOOD_RATES = "good η: octaves"  # a column's name
VALLEYS = f"""\
*Good η*: where nats are at most {WIDE} above the method's own best, by straight lines over log η between the rates, and
how many octaves (doublings of η) that is, with a 95 % bootstrap interval over seeds and questions. ≤ and ≥: the valley
may go on outside the grid.
"""


class Valley(NamedTuple):
    """Where a method is within `WIDE` of its best.

    Attributes:
      low, high: the lowest and highest η, which are the grid's own where the valley is open.
      octaves: log2(high / low), with a 95 % bootstrap interval over seeds and questions.
      open_low, open_high: whether it may go on outside the grid.
    """

    low: float
    high: float
    octaves: Estimate
    open_low: bool
    open_high: bool

    def __str__(self):
        low, high = f"{self.low:.2g}", f"{self.high:.2g}"
        least = "≥ " if self.open_low or self.open_high else ""
        return (
            f"{'≤ ' if self.open_low else ''}{low} to {'≥ ' if self.open_high else ''}{high}: {least}"
            f"{self.octaves.value:.1f} ({self.octaves.low:.1f} to {self.octaves.high:.1f})"
        )


def valley(log_p: np.ndarray, tokens: np.ndarray, rates: Sequence[float]) -> Valley:
    """Returns where a method is near its best.

    Args:
      log_p: summed log p of the right answers, (rates, seeds, questions).
      tokens: of each right answer.
      rates: η, rising.
    """
    _, seeds, questions = log_p.shape
    nats = -log_p.sum(-1).mean(1) / tokens.sum()
    places = [float(place[0]) for place in _ends(nats[:, None])]
    first, last = (float(_at(rates, np.array(place))) for place in places)
    drawn, weights = _drawn(questions), _drawn(seeds) / seeds
    by_seed = -(log_p.reshape(-1, questions) @ drawn).reshape(len(rates), seeds, -1)
    ends = _ends((by_seed * weights).sum(1) / (tokens @ drawn))
    low, high = np.quantile(_at(rates, ends[1]) - _at(rates, ends[0]), [0.025, 0.975])
    octaves = Estimate(last - first, float(low), float(high))
    return Valley(2**first, 2**last, octaves, open_low=places[0] == 0, open_high=places[1] == len(rates) - 1)


def _ends(nats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and last place of each column, in steps of the grid, that is within `WIDE` of its least."""
    last = len(nats) - 1
    return last - _end(nats[::-1]), _end(nats)


def _end(nats: np.ndarray) -> np.ndarray:
    """Returns where each column, from its least on downwards in the array, first exceeds it by `WIDE`."""
    best, limit = nats.argmin(0), nats.min(0) + WIDE
    place, inside = best.astype(float), np.ones(nats.shape[1], bool)
    for step, (here, after) in enumerate(itertools.pairwise(nats)):
        walked = inside & (step >= best)
        rise = np.where(after > here, after - here, 1.0)
        share = np.where(after > limit, (limit - here) / rise, 1.0)
        place = np.where(walked, step + share, place)
        inside &= ~walked | (after <= limit)
    return place


def _at(rates: Sequence[float], places: np.ndarray) -> np.ndarray:
    """Returns log2 η at places of the grid."""
    return np.interp(places, np.arange(len(rates)), np.log2(rates))


@functools.cache
def _drawn(count: int) -> np.ndarray:
    """Returns how often each of so many is drawn, with replacement, in each resample: (count, resamples)."""
    return np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), _RESAMPLES).T.astype(float)
