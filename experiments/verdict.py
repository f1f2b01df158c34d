"""What Stable-LoRA is worth beside simpler means, in two sentences and a table, made again by `make results`."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.running.markdown import markdown
from experiments.studies import pilot
from experiments.studies.rates_tables import PILOT, Grid, by_setting, grid_of, of_pilot
from stable_lora_jax.evaluation import Estimate

_LAMS = ("λ = 0.0005", "λ = 0.002", "λ = 0.005")
_START = "A₀ × 1/4"
_MEANS = (*_LAMS, _START, pilot.EARLY)  # the table's columns
_MIDDLE = "λ = 0.002"  # the λ whose whole curve is told
_HIGH = 2.5e-4  # a rate of the pilot that is too high with few data
_FEW = "few data and many passes"
DATA: Mapping[str, str] = {"few": _FEW, "arc3": "three passes", "fresh": "fresh data"}  # of the pilot's settings


class Judged(NamedTuple):
    """The runs that a setting is judged by.

    Attributes:
      rates: η, rising.
      setting: log p of each method at them.
      best: AdamW's best rate.
      gains: method -> nats per token minus AdamW's, each at its best rate, and the number of seeds.
    """

    rates: list[float]
    setting: pilot.Setting
    best: float
    gains: dict[str, tuple[Estimate, int]]

    def at(self, rate: float, method: str) -> Estimate:
        """Returns nats per token minus AdamW's at the same rate."""
        return pilot.compared(self.setting, pilot.at_rate(self.rates.index(rate)), method)[0]

    def better_from(self, method: str) -> str:
        """Returns the rate from which on a method is better than AdamW with all of its interval; a dash if none."""
        better = [self.at(rate, method).high < 0 for rate in self.rates]
        return next((f"{rate:g}" for index, rate in enumerate(self.rates) if all(better[index:])), "-")


def verdict(results: Path) -> str:
    """Returns what the shrink and simpler means are worth at the best learning rates and at others."""
    pilots = {name: pilot.load(results, name) for name in pilot.SETTINGS}
    judged = {name: _by_pilot(setting) for name, setting in pilots.items()}
    measured = {name: _by_grid(grid) for name, grid in _below_the_pilot(results).items()}
    judged |= measured

    def span(*methods: str) -> str:
        found = [each.gains[method][0].value for each in judged.values() for method in methods if method in each.gains]
        return f"{min(found):+.3f} to {max(found):+.3f}"

    header = ("data", "AdamW's best η", *_MEANS, *(f"{method} is better from η" for method in (_MIDDLE, _START)))
    rows = [
        (
            DATA[name],
            f"{each.best:g}",
            *(_told(*each.gains[method]) if method in each.gains else "-" for method in _MEANS),
            *(each.better_from(method) for method in (_MIDDLE, _START)),
        )
        for name, each in judged.items()
    ]
    return (
        f"With every method at its best learning rate, the right answers' nats per token differ from AdamW's by "
        f"{span(*_LAMS)} with λ of 0.0005 to 0.005 (negative is better), by {span(_START)} with a start of a quarter "
        f"of the size, and by {span(pilot.EARLY)} with AdamW stopped early. What the shrink buys is robustness to a "
        "rate that is too high, at a price where the rate is too low, and simpler means buy it too: "
        f"{_too_high(_by_pilot(pilots['few']))}"
        f"{''.join(_too_low(each) for name, each in measured.items() if name == 'few')}.\n\n"
        f"{markdown(header, rows)}\n\n"
        "SmolLM2-135M, s = 16; nats per token of the right answers minus AdamW's, each at its best of "
        f"{min(len(each.rates) for each in judged.values())} rates or more; ± is half a 95 % interval over seeds and "
        "questions, of one seed, where it says so, over questions alone; not corrected for the number of comparisons. "
        f"{_sources(judged, measured)}\n"
    )


def _by_pilot(setting: pilot.Setting) -> Judged:
    best = pilot.RATES[setting.nats("AdamW").mean(1).argmin()]
    gains = {
        method: (pilot.compared(setting, pilot.at_best_rate, method)[0], setting.nats("AdamW").shape[1])
        for method in _MEANS
    }
    return Judged(list(pilot.RATES), setting, best, gains)


def _by_grid(grid: Grid) -> Judged:
    gains = {name: (grid.gain(name)[0], len(grid.seeds_at_best(name))) for name in grid.best if name != "AdamW"}
    return Judged(grid.rates, grid.setting, grid.of_best("AdamW"), gains)


def _below_the_pilot(results: Path) -> dict[str, Grid]:
    """Returns what was measured here of settings where AdamW's best rate was found below the pilot's grid."""
    grids = {group: grid_of(by_cell) for group, by_cell in by_setting(results).items() if of_pilot(group)}
    below = {group.name: grid for group, grid in grids.items() if grid and grid.of_best("AdamW") < min(pilot.RATES)}
    return {PILOT[name][0]: grid for name, grid in below.items()}


def _too_high(few: Judged) -> str:
    shrunk, start, slow = (
        pilot.told(few.at(_HIGH, method)).removeprefix("-") for method in (_MIDDLE, _START, "rate of B × 1/4")
    )
    return (
        f"with {_FEW} at η = {_HIGH:g}, {_MIDDLE} gains {shrunk} nats per token, the smaller start {start}, and a "
        f"quarter of the rate for B {slow}"
    )


def _too_low(few: Judged) -> str:
    lowest = few.rates[0]
    shrunk, start = (pilot.told(few.at(lowest, method)).removeprefix("+") for method in (_MIDDLE, _START))
    return f"; at {lowest:g}, below AdamW's best of {few.best:g}, the first two lose {shrunk} and {start}"


def _told(gain: Estimate, seeds: int) -> str:
    return f"{pilot.told(gain)}{' (1 seed)' if seeds == 1 else ''}"


def _sources(judged: Mapping[str, Judged], measured: Mapping[str, Judged]) -> str:
    theirs = " and ".join(DATA[name] for name in judged if name not in measured)
    ours = "".join(
        f"; {DATA[name]} is measured again, at rates from {each.rates[0]:g}, as AdamW's best lay below the pilot's"
        for name, each in measured.items()
    )
    return f"{theirs[:1].upper()}{theirs[1:]} are of the pilot, 420 runs on one H100{ours}."
