"""What Stable-LoRA is worth beside simpler means, in two sentences and a table, made again by `make results`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.running import tables
from experiments.running.markdown import markdown
from experiments.studies import pilot
from experiments.studies.rates_tables import Grid, Group, beyond_the_pilot, by_setting
from experiments.studies.valley import WIDE, Valley, valley
from stable_lora_jax.evaluation import Estimate

_LAMS = ("λ = 0.0005", "λ = 0.002", "λ = 0.005")
_START = "A₀ × 1/4"
TOLD = "λ = 0.002"  # the λ whose whole curve is told
STOPPED = "λ = 0.02"  # one whose stop rule acts within a run
_DECAY = "decay on A, 0.002 per step"
_SLOW_B = "rate of B × 1/4"
_ROWS = ("AdamW", *_LAMS, STOPPED, _START, _DECAY, _SLOW_B, pilot.EARLY, "lora-plus", "riemannian", "lora-rite")
_HIGH = 2.5e-4  # a rate that is too high with few data
DATA: Mapping[str, str] = {  # of the pilot's settings
    "few": "few data and many passes",
    "arc3": "three passes",
    "fresh": "fresh data",
}


class Judged(NamedTuple):
    """What a setting says of each method.

    Attributes:
      gains: method -> nats per token minus AdamW's, each at its best rate, and the number of seeds.
      valleys: method -> its good rates.
    """

    gains: dict[str, tuple[Estimate, int]]
    valleys: dict[str, Valley]


def verdict(results: Path) -> str:
    """Returns what the shrink and simpler means are worth at the best learning rates and at others."""
    judged, grids = _judged(results)

    def span(*methods: str) -> str:
        found = [each.gains[method][0].value for each in judged.values() for method in methods if method in each.gains]
        return f"{min(found):+.3f} to {max(found):+.3f}"

    few = grids.get("few", {})
    return (
        "With every method at its best learning rate (SmolLM2-135M, s = 16, three settings), the right answers' nats "
        f"per token differ from AdamW's by {span(*_LAMS)} with λ of 0.0005 to 0.005 (negative is better), by "
        f"{span(_START)} with a start of a quarter of the size, and by {span(pilot.EARLY)} with AdamW stopped early. "
        f"{_robustness(few)}{_moved(judged['few'])}.\n"
    )


def _robustness(few: Mapping[Group, Grid]) -> str:
    """Returns what is gained at a rate that is too high, in numbers if few data were measured again at it."""
    methods, told, where = (TOLD, _START, pilot.EARLY), {}, ""
    whole = [grid for grid in few.values() if set(methods) <= set(grid.best) and _HIGH in grid.rates["AdamW"]]
    for grid in whole[:1]:
        high = pilot.at_rate(grid.rates["AdamW"].index(_HIGH))
        told = {name: pilot.told(pilot.compared(grid.setting, high, name)[0]).removeprefix("-") for name in methods}
        where = f" nats with {DATA['few']} at η = {_HIGH:g}, {tables.seeds_text(len(grid.seeds))}"

    def gain(method: str, where: str = "") -> str:
        return f" ({told[method]}{where})" if told else ""

    return (
        f"What the shrink buys is robustness to a rate that is too high{gain(TOLD, where)}, which a smaller start"
        f"{gain(_START)}, stopping early{gain(pilot.EARLY)} and a lower rate buy too"
    )


def _moved(few: Judged) -> str:
    """Returns where the rates lie that are good for AdamW and for the λ that is told, if both were measured."""
    if TOLD not in few.valleys:
        return ""
    adamw, shrunk = few.valleys["AdamW"], few.valleys[TOLD]
    return (
        f": with {DATA['few']}, AdamW is within {WIDE} nats of its own best at η of {_range(adamw)} "
        f"({_octaves(adamw)}), and {TOLD} at {_range(shrunk)} ({_octaves(shrunk)})"
    )


def stopping(results: Path) -> str:
    """Returns in how many matrices the stop rule acted at the best rates, of the λ that were tried with few data."""
    judged, grids = _judged(results)
    few = grids.get("few", {})
    if not any(set(_LAMS) & set(grid.best) for grid in few.values()):
        return ""
    told = (
        f"With {DATA['few']}, {_stable(results, few, _LAMS)} matrices of λ from 0.0005 to 0.005 became stable at their "
        "best rates, and the others' A decayed until the end"
    )
    if any(STOPPED in grid.best for grid in few.values()):
        told += (
            f"; with {STOPPED}, {_stable(results, few, [STOPPED])} did, and it is "
            f"{_told(*judged['few'].gains[STOPPED])} nats from AdamW, each at its best"
        )
    return f"{told}."


def _stable(results: Path, grids: Mapping[Group, Grid], lams: Sequence[str]) -> str:
    """Returns how many matrices became stable in the runs of some λ at their best rates."""
    lines, steps = by_setting(results), []
    for group, grid in grids.items():
        for lam in set(lams) & set(grid.best):
            runs = grid.records_of_best(lines[group], lam)
            steps += [step for run in runs for pair in run["stable_at"].values() for step in pair]
    return f"{np.count_nonzero(steps)} of {len(steps)}"


def table(results: Path) -> str:
    """Returns what each method is worth at its best rate, and its good rates, for every setting."""
    judged, grids = _judged(results)
    return (
        f"{_table(judged)}\n\n"
        "SmolLM2-135M, s = 16. *Minus AdamW*: in nats per token of the right answers, each at its best of 5 rates or "
        "more; ± is half a 95 % interval over seeds and questions, of one seed, where it says so, over questions "
        f"alone; not corrected for the number of comparisons. *Good η*: within {WIDE} nats per token of the method's "
        f"own best; ≤ and ≥ where they may go on outside the grid. {_sources(grids)}\n"
    )


def _judged(results: Path) -> tuple[dict[str, Judged], dict[str, dict[Group, Grid]]]:
    """Returns what each of the pilot's settings says, and the grids of those that were measured again."""
    grids = _measured_again(results)
    pilots = {name: pilot.load(results, name) for name in pilot.SETTINGS}
    judged = {name: _by_pilot(setting) for name, setting in pilots.items()}
    return judged | {name: _by_grids(list(found.values())) for name, found in grids.items()}, grids


def _measured_again(results: Path) -> dict[str, dict[Group, Grid]]:
    """Returns the grids of each setting that was measured again, the one first that has most of what is told."""

    def missing(item: tuple[Group, Grid]) -> int:
        return sum(name not in item[1].best for name in (TOLD, _START, pilot.EARLY))

    return {name: dict(sorted(found.items(), key=missing)) for name, found in beyond_the_pilot(results).items()}


def _by_pilot(setting: pilot.Setting) -> Judged:
    seeds = setting.nats("AdamW").shape[1]
    found = [name for name in _ROWS if name in setting.log_p]
    gains = {name: (pilot.compared(setting, pilot.at_best_rate, name)[0], seeds) for name in found if name != "AdamW"}
    methods = [name for name in found if name != pilot.EARLY]  # whose "rates" are lengths too
    return Judged(gains, {name: valley(setting.log_p[name], setting.tokens, pilot.RATES) for name in methods})


def _by_grids(grids: Sequence[Grid]) -> Judged:
    """Returns each method's numbers, of the first grid that has it, against the AdamW of the same grid."""
    gains, valleys = {}, {}
    for grid in reversed(grids):
        log_p, tokens = grid.setting.log_p, grid.setting.tokens
        gains |= {name: (grid.gain(name)[0], len(grid.seeds_at_best(name))) for name in grid.best if name != "AdamW"}
        valleys |= {name: valley(log_p[name], tokens, rates) for name, rates in grid.rates.items()}
    return Judged(gains, valleys)


def at_half_the_rate(results: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the nats per token of a λ at each rate, minus AdamW's at half that rate, and at the same, by data.

    Grids that do not rise by octaves are left out.
    """
    settings = {DATA[name]: (pilot.load(results, name), list(pilot.RATES)) for name in pilot.SETTINGS}
    for name, grids in _measured_again(results).items():
        grid = next(iter(grids.values()))
        if TOLD in grid.best and grid.has_adamws_rates(TOLD):
            settings[f"{DATA[name]}, measured again"] = grid.setting, grid.rates[TOLD]
    found = {}
    for name, (setting, rates) in settings.items():
        if np.allclose(np.divide(rates[1:], rates[:-1]), 2):
            adamw, shrunk = (setting.nats(method).mean(1) for method in ("AdamW", TOLD))
            found[name] = shrunk[1:] - adamw[:-1], shrunk - adamw
    return found


def _table(judged: Mapping[str, Judged]) -> str:
    header = ("", *(f"{DATA[name]}: {what}" for name in judged for what in ("minus AdamW", "good η")))
    rows = []
    for method in _ROWS:
        if not any(method in each.gains or method in each.valleys for each in judged.values()):
            continue
        row = [method]
        for each in judged.values():
            row.append(_told(*each.gains[method]) if method in each.gains else "-")
            row.append(_range(each.valleys[method]) if method in each.valleys else "-")
        rows.append(row)
    return markdown(header, rows)


def _told(gain: Estimate, seeds: int) -> str:
    return f"{pilot.told(gain)}{' (1 seed)' if seeds == 1 else ''}"


def _range(found: Valley) -> str:
    return str(found).partition(":")[0]


def _octaves(found: Valley) -> str:
    return f"{str(found).partition(': ')[2].partition(' (')[0]} octaves"


def _sources(grids: Mapping[str, Mapping[Group, Grid]]) -> str:
    theirs = " and ".join(DATA[name] for name in pilot.SETTINGS if name not in grids)
    ours = ""
    for name, found in grids.items():
        (group, grid), *others = found.items()
        low, high = grid.rates["AdamW"][0], grid.rates["AdamW"][-1]
        ours += f"; {DATA[name]} is measured again in {group.dtype}, AdamW at rates from {low:g} to {high:g}, "
        ours += "as best rates lay outside the pilot's"
        known = set(grid.best)
        for other, more in others:
            ours += f" ({', '.join(x for x in more.best if x not in known)} in {other.dtype}, against an AdamW in it)"
            known |= set(more.best)
    return f"{theirs[:1].upper()}{theirs[1:]} are of the pilot, 420 runs on one H100{ours}."
