"""The tables of experiments.studies.rates: curves over the rates, and differences at each method's best one."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from experiments.running import tables
from experiments.running.cells import Record, read_lines
from experiments.running.markdown import markdown
from experiments.studies import pilot
from experiments.studies.valley import GOOD_RATES, VALLEYS, valley
from stable_lora_jax.evaluation import Estimate, holm, seeds_and_questions

LEGEND = """\
*At the best rate*: nats per token of the reported questions minus AdamW's, each at the rate whose held-out nats are
least over the seeds. ± is half a 95 % interval over seeds and questions together, of one seed over the questions
alone; p values of a column are corrected (Holm). *Edge*: the best rate is the grid's first or last, so a better one may
lie outside. Curves, choices and means are of the seeds that all methods have at every rate; a difference at the best
rates is of those that the method and AdamW have there. A method that was given other rates than AdamW has a grid of its
own, and no mean to compare. *Stable*: of the matrices of all seeds at the best rate, how many became stable, so that
the shrink of A stopped, and the median step.
"""
BESIDE = """\
*Beside the pilot*: each cell that was measured here, and the pilot's own number. *Minus AdamW*: at the same rate, ±
half a 95 % interval, of one seed over the questions alone, else over seeds and questions; not corrected.
"""
# Settings of the pilot, by the names that they have here, and their steps; its s is 16.
PILOT = {"few": ("few", 500), "passes": ("arc3", 750), "fresh": ("fresh", 500)}
# A method looks alike in every column, and in the pilot's figure. The last five are not drawn there.
_COLOURS = {
    **pilot.METHODS,
    "λ = 0.02": "gold",
    pilot.EARLY: "C3",
    "lora-plus": "C4",
    "riemannian": "navy",
    "lora-rite": "black",
}
OWN_RATES = 5  # that a method's grid has at least, if it is not AdamW's
CellKey: TypeAlias = tuple[str, float, int]  # method, rate, seed


class Curves(NamedTuple):
    """What a column of the figure shows.

    Attributes:
      rates: method -> its η.
      nats: method -> nats per token at each.
      over_steps: η -> AdamW's steps and held-out nats at them.
    """

    rates: dict[str, list[float]]
    nats: dict[str, np.ndarray]
    over_steps: dict[float, np.ndarray]


def method_of(record: Record) -> str:
    """Returns how a table calls a run's method."""
    train = record["train"]
    if train["method"] == "stable-lora":
        return f"λ = {train['lam']:g}"
    if train["method"] == "lora-plus" and train["ratio"] < 1:
        return f"rate of B × 1/{1 / train['ratio']:g}"
    if train["method"] != "adamw":
        return train["method"]
    if train.get("eval_every"):
        return pilot.EARLY
    if train["a_scale"] != 1:
        return f"A₀ × 1/{1 / train['a_scale']:g}"
    if decay := train["weight_decay"] * train["learning_rate"]:
        return f"decay on A{'' if train['decay_only_a'] else ' and B'}, {decay:g} per step"
    return "AdamW"


class Group(NamedTuple):
    """What the lines of one table share."""

    name: str
    scale: float
    steps: int
    dtype: str
    model: str
    data: str


def by_setting(results: Path) -> dict[Group, dict[CellKey, Record]]:
    """Returns what is shared -> (method, rate, seed) -> line."""

    def group_of(record: Record) -> Group:
        train = record["train"]
        data, scale = Path(train["data"]).stem, train["alpha"] / train["rank"]
        return Group(data.partition("-")[0], scale, train["steps"], train["dtype"], train["model"], data)

    return {
        group: {(method_of(x), x["train"]["learning_rate"], x["train"]["seed"]): x for x in lines}
        for group, lines in tables.grouped(read_lines("rates", results), group_of).items()
    }


def of_pilot(group: Group) -> pilot.Setting | None:
    """Returns the pilot's runs in the same setting, if it has any."""
    name, steps = PILOT.get(group.name, ("", 0))
    if (group.steps, group.scale, group.model) != (steps, 16, "smollm2-135m"):
        return None
    return pilot.load(Path(__file__).parent.parent / "results", name)


def report(results: Path) -> str:
    """Returns the tables, one or two per setting and scale, and draws the figure."""
    text, curves = "", {}
    for group, by_cell in by_setting(results).items():
        title = f"{group.name}, s = {group.scale:g}, {group.steps} steps in {group.dtype}"
        if theirs := of_pilot(group):
            text += beside_pilot(title, by_cell, theirs)
        table, shown = over_rates(title, by_cell)
        text += table
        curves |= {title: shown} if shown else {}
    if not text:
        return ""
    text += BESIDE if "beside the pilot" in text else ""
    if not curves:
        return text
    draw(results / "rates.png", curves)
    return f"{text}{LEGEND}{VALLEYS}\n![nats per token over the learning rate](rates.png)\n"


class Grid(NamedTuple):
    """Methods that have every rate of AdamW's, or a grid of their own, with the seeds that all of them have.

    Attributes:
      rates: method -> its η, rising.
      seeds: shared ones.
      setting: each method's log p, (its rates, seeds, questions).
      best: method -> index of the rate whose held-out nats are least over the seeds.
      at_best: method -> seed -> its log p there: of `seeds`, and of some that chose nothing.
    """

    rates: dict[str, list[float]]
    seeds: list[int]
    setting: pilot.Setting
    best: dict[str, int]
    at_best: dict[str, dict[int, np.ndarray]]

    def of_best(self, method: str) -> float:
        """Returns a method's best rate."""
        return self.rates[method][self.best[method]]

    def seeds_at_best(self, method: str) -> list[int]:
        """Returns the seeds that the method and AdamW have, each at its best rate."""
        return [seed for seed in self.at_best["AdamW"] if seed in self.at_best[method]]

    def gain(self, method: str) -> tuple[Estimate, float]:
        """Returns nats per token minus AdamW's, each at its best rate, with a 95 % interval and its p value."""
        ours, adamw = self.at_best[method], self.at_best["AdamW"]
        differences = np.stack([adamw[seed] - ours[seed] for seed in self.seeds_at_best(method)])
        return seeds_and_questions(differences, self.setting.tokens)

    def records_of_best(self, by_cell: Mapping[CellKey, Record], method: str) -> list[Record]:
        """Returns a method's lines at its best rate."""
        return [by_cell[method, self.of_best(method), seed] for seed in self.at_best[method]]

    def is_edge(self, method: str) -> bool:
        """Returns whether the best rate is the grid's first or last, so that a better one may lie outside."""
        return self.best[method] in (0, len(self.rates[method]) - 1)

    def has_adamws_rates(self, method: str) -> bool:
        """Returns whether the method's grid is AdamW's, so that curves can be compared rate by rate."""
        return self.rates[method] == self.rates["AdamW"]


def grid_of(by_cell: Mapping[CellKey, Record]) -> Grid | None:
    """Returns the methods to be compared; None without AdamW, another method and two rates.

    A method is compared if it has all of AdamW's rates, or a grid of its own of at least `OWN_RATES`.
    """
    every = sorted({seed for _, _, seed in by_cell})
    rates: dict[str, list[float]] = {}
    for name, rate, seed in by_cell:
        if seed == every[0]:
            rates[name] = sorted([*rates.get(name, []), rate])
    adamws = set(rates.get("AdamW", []))
    rates = {name: found for name, found in rates.items() if adamws <= set(found) or len(found) >= OWN_RATES}
    if len(adamws) < 2 or len(rates) < 2:
        return None
    seeds = [x for x in every if all((name, rate, x) in by_cell for name, found in rates.items() for rate in found)]

    def of(name: str, field: str) -> np.ndarray:
        return np.array([[by_cell[name, rate, seed][field] for seed in seeds] for rate in rates[name]], float)

    tokens = np.array(by_cell["AdamW", rates["AdamW"][0], seeds[0]]["tokens"], float)
    setting = pilot.Setting({name: of(name, "log_p") for name in rates}, tokens, {})
    best = {name: int(of(name, "held_out_nll").mean(1).argmin()) for name in rates}

    def at_best(name: str) -> dict[int, np.ndarray]:
        cells = {seed: (name, rates[name][best[name]], seed) for seed in every}
        return {seed: np.array(by_cell[cell]["log_p"], float) for seed, cell in cells.items() if cell in by_cell}

    return Grid(rates, seeds, setting, best, {name: at_best(name) for name in rates})


def beyond_the_pilot(results: Path) -> dict[str, dict[Group, Grid]]:
    """Returns the pilot's settings in which a best rate was found outside its grid, and what was measured there."""

    def is_beyond(grid: Grid) -> bool:
        on_adamws = [name for name in grid.best if grid.has_adamws_rates(name)]
        return not all(min(pilot.RATES) <= grid.of_best(name) <= max(pilot.RATES) for name in on_adamws)

    found: dict[str, dict[Group, Grid]] = {}
    for group, by_cell in by_setting(results).items():
        if of_pilot(group) and (grid := grid_of(by_cell)) and is_beyond(grid):
            found.setdefault(PILOT[group.name][0], {})[group] = grid
    return found


def over_rates(title: str, by_cell: Mapping[CellKey, Record]) -> tuple[str, Curves | None]:
    """Returns the table of the methods that have every rate, and what the figure shows; nothing of a single one."""
    grid = grid_of(by_cell)
    if grid is None:
        return "", None
    setting, tokens = grid.setting, grid.setting.tokens
    others = [name for name in grid.best if name != "AdamW"]
    gains = _corrected({name: grid.gain(name) for name in others})
    counts = {name: tables.seeds_text(len(grid.seeds_at_best(name))) for name in others}
    means = [name for name in others if grid.has_adamws_rates(name)]
    means = _corrected({name: pilot.compared(setting, pilot.over_rates, name) for name in means})
    nats = {name: setting.nats(name).mean(1) for name in grid.best}
    every = sorted({rate for of_method in grid.rates.values() for rate in of_method})
    rows = []
    for name, rates in grid.rates.items():
        at = {rate: f"{value:.3f}" for rate, value in zip(rates, nats[name], strict=True)}
        gain, p = gains.get(name, ("-", "-"))
        rows.append(
            (
                name,
                *(at.get(rate, "-") for rate in every),
                f"{grid.of_best(name):g}{' (edge)' if grid.is_edge(name) else ''}",
                f"{gain} ({counts[name]})" if name in counts else gain,
                p,
                *means.get(name, ("-", "-")),
                valley(setting.log_p[name], tokens, rates),
                tables.stable_share(grid.records_of_best(by_cell, name)),
            )
        )
    header = ("nats per token", *(f"η = {rate:g}" for rate in every), "chosen η", "at the best rate, minus AdamW", "p")
    header += ("mean of the rates, minus AdamW", "p", GOOD_RATES, "stable")
    over_steps = {
        rate: np.mean([by_cell[pilot.EARLY, rate, seed]["held_out_curve"] for seed in grid.seeds], axis=0).T
        for rate in grid.rates.get(pilot.EARLY, ())
    }
    seeds = tables.seeds_text(len(grid.seeds))
    text = f"**{title}**, {len(tokens)} questions, {seeds}\n\n{markdown(header, rows)}\n\n"
    return text, Curves(grid.rates, nats, over_steps)


def _corrected(found: Mapping[str, tuple[Estimate, float]]) -> dict[str, tuple[str, str]]:
    """Returns each method's difference from AdamW and its p value, corrected for all of them, as tables show them."""
    corrected = holm([p for _, p in found.values()])
    told = ((pilot.told(each), pilot.p_text(p)) for (each, _), p in zip(found.values(), corrected, strict=True))
    return dict(zip(found, told, strict=True))


class Repeated(NamedTuple):
    """A method at a rate of the pilot: its nats per token, and these minus AdamW's at the same rate, there and here."""

    rate: float
    method: str
    seeds: int
    nats: tuple[float, float]
    minus_adamw: tuple[Estimate, Estimate]


def repeated(by_cell: Mapping[CellKey, Record], theirs: pilot.Setting) -> list[Repeated]:
    """Returns what was measured here at the pilot's rates next to its own numbers.

    Args:
      by_cell: (method, rate, seed) -> line.
      theirs: the pilot's setting.
    """
    found = []
    for (index, rate), method in itertools.product(enumerate(pilot.RATES), pilot.METHODS):
        seeds = [seed for m, r, seed in by_cell if (m, r) == (method, rate) and ("AdamW", rate, seed) in by_cell]
        if not seeds:
            continue
        lines = {name: [by_cell[name, rate, seed] for seed in seeds] for name in ("AdamW", method)}
        tokens = np.array(lines[method][0]["tokens"], float)
        ours = {name: np.array([[line["log_p"] for line in each]], float) for name, each in lines.items()}
        there = pilot.Setting({name: theirs.log_p[name][[index]] for name in ours}, theirs.tokens, {})
        both = there, pilot.Setting(ours, tokens, {})
        nats = [float(setting.nats(method).mean()) for setting in both]
        minus = [pilot.compared(setting, pilot.over_rates, method)[0] for setting in both]
        found.append(Repeated(rate, method, len(seeds), (nats[0], nats[1]), (minus[0], minus[1])))
    return found


def beside_pilot(title: str, by_cell: Mapping[CellKey, Record], theirs: pilot.Setting) -> str:
    """Returns a table of `repeated`; nothing if nothing was.

    Args:
      title: of the table.
      by_cell: (method, rate, seed) -> line.
      theirs: the pilot's setting.
    """
    found = repeated(by_cell, theirs)
    if not found:
        return ""
    rows = [
        [f"{each.rate:g}", each.method, *(f"{value:.3f}" for value in each.nats)]
        + [pilot.told(minus) if each.method != "AdamW" else "-" for minus in each.minus_adamw]
        for each in found
    ]
    header = ("η", "method", "nats, pilot", "nats, here", "minus AdamW, pilot", "minus AdamW, here")
    seeds = tables.seeds_text(*(each.seeds for each in found))
    title = f"**{title}, beside the pilot**, {len(theirs.tokens)} questions, {seeds} here"
    return f"{title}\n\n{markdown(header, rows)}\n\n"


def draw(path: Path, curves: dict[str, Curves]) -> None:
    """Writes the figure: a column per table; above, nats per token over η, below, AdamW's held-out nats over steps.

    Without runs that were validated while they trained a column has nothing below; if none has any, there is no row.
    """
    validated = any(each.over_steps for each in curves.values())
    figure = Figure(figsize=(4.4 * len(curves), 8 if validated else 4.2), layout="constrained")
    axes = figure.subplots(2 if validated else 1, len(curves), squeeze=False)
    for column, (title, (rates, found, over_steps)) in zip(axes.T, curves.items(), strict=True):
        above = column[0]
        for name, nats in found.items():
            above.plot(rates[name], nats, marker="o", markersize=3.5, label=name, color=_COLOURS.get(name))
        above.set(xscale="log", xlabel="peak learning rate η", title=title)
        ticks = sorted({rate for of_method in rates.values() for rate in of_method})
        above.set_xticks(ticks, [f"{rate:g}" for rate in ticks], fontsize=8, rotation=30)
        above.set_xticks([], minor=True)
        above.legend(fontsize=8)
        for below in column[1:]:
            below.set_visible(bool(over_steps))
            for rate, (steps, nats) in over_steps.items():
                below.plot(steps, nats, marker="o", markersize=3.5, label=f"η = {rate:g}")
            below.set(xlabel="step", title="AdamW while it trains")
            if over_steps:
                below.legend(fontsize=8)
    for row, label in zip(
        axes, ("nats per token of the right answers", "the same of the held-out questions"), strict=False
    ):
        row[0].set_ylabel(label)
    figure.savefig(path, dpi=110)
