"""The tables and the figure of `small_decoder`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.running import tables
from experiments.running.markdown import markdown
from experiments.studies import pilot
from stable_lora_jax.evaluation import Estimate, holm, mean_interval, paired_p_value
from stable_lora_jax.training import read_metrics

WIDE, EARLY = 0.01, "AdamW, stopped early"
LEGEND = f"""\
Nats per byte on windows of ARC-Easy's test split. *Minus AdamW*: mean difference over runs of the same seed, with
half a 95 % interval over the seeds (Student's t), for the same windows; at the rate that is best on one half of the
windows, on the other half, and as the mean of the rates that all ways have. p values are of paired t tests, corrected
(Holm) within a column of a table. *Edge*: the chosen rate is the first or last of the way's grid, so a better one may
lie outside. *Wide*: rates within {WIDE} of the way's own best. {EARLY}: rate and step are chosen together.
"""


@dataclass(frozen=True)
class Setting:
    """The ways of one setting and scale.

    Attributes:
      title: setting and s.
      steps: of every run.
      rates: way -> its grid of η.
      nats: way -> nats per byte (rates, seeds, marks, halves).
      best: way -> index of the rate that is best on one half of the windows.
      at_best: way -> nats per byte of each seed at that rate on the other half; AdamW stopped early among them.
      over_rates: way -> the same on both halves, as the mean of the rates that all ways have.
    """

    title: str
    steps: int
    rates: dict[str, list[float]]
    nats: dict[str, np.ndarray]
    best: dict[str, int]
    at_best: dict[str, np.ndarray]
    over_rates: dict[str, np.ndarray]


def by_setting(lines: list[dict[str, Any]]) -> list[Setting]:
    """Returns what the lines say, setting by setting; those without AdamW are left out."""
    settings = []
    for (setting, scale), group in tables.grouped(lines, lambda line: (line["setting"], line["scale"])).items():
        of_ways = tables.grouped(group, lambda line: line["way"])
        if "AdamW" not in of_ways:
            continue
        rates = {way: sorted(rate for line in each for rate in line["rates"]) for way, each in of_ways.items()}
        nats = {way: over_all_rates(each) for way, each in of_ways.items()}
        shared = set.intersection(*map(set, rates.values()))
        best = {way: int(each[..., -1, 0].mean(1).argmin()) for way, each in nats.items()}
        at_best = {way: each[best[way], :, -1, 1] for way, each in nats.items()}
        chosen_on = nats["AdamW"][..., 0].mean(1)
        rate, mark = np.unravel_index(chosen_on.argmin(), chosen_on.shape)
        best[EARLY], at_best[EARLY] = int(rate), nats["AdamW"][rate, :, mark, 1]
        over_rates = {
            way: each[[rate in shared for rate in rates[way]], :, -1].mean((0, 2)) for way, each in nats.items()
        }
        title = f"{setting}, s = {scale:g}"
        settings.append(Setting(title, group[0]["steps"], rates, nats, best, at_best, over_rates))
    return settings


def report(results: Path) -> str:
    """Returns the tables, one per setting and scale, and draws the figure."""
    lines = read_metrics(results / "small_decoder.jsonl")
    settings = by_setting(lines)
    if not settings:
        return ""
    text = ""
    header = ("way", "chosen η", "nats per byte", "minus AdamW", "p", "mean of rates minus AdamW", "p", "wide")
    for each in settings:
        columns = [minus(of, "AdamW") for of in (each.at_best, each.over_rates)]
        rows = []
        for way, nats in each.at_best.items():
            compared = [cell for column in columns for cell in _told(column.get(way))]
            wide = str(_wide(each.nats[way])) if way in each.nats else "-"
            rows.append([way, chosen(each, way), f"{nats.mean():.4f}", *compared, wide])
        runs = f"{each.steps} steps, {tables.seeds_text(len(each.at_best['AdamW']))}"
        text += f"**{each.title}**, {runs}\n\n{markdown(header, rows)}\n\n"
    draw(results / "small_decoder.png", settings)
    minutes = sum(line["seconds"] for line in lines) / 60
    made = " and ".join(sorted({line["machine"]["cpu"] for line in lines}))
    text += f"{LEGEND}\nMeasured on {made}, {minutes:.0f} minutes.\n\n"
    return f"{text}![nats over the rate, and over the steps](small_decoder.png)\n"


def over_all_rates(lines: list[dict[str, Any]]) -> np.ndarray:
    """Returns a way's nats per byte in the order of the rates, of which each line has some.

    Args:
      lines: of one way, each with rates and nats (rates, seeds, marks, halves).

    Returns:
      The nats of all rates, with shape (all rates, seeds, marks, halves).
    """
    by_rate = {rate: nats for line in lines for rate, nats in zip(line["rates"], line["nats"], strict=True)}
    return np.array([by_rate[rate] for rate in sorted(by_rate)])


def minus(of: dict[str, np.ndarray], baseline: str) -> dict[str, tuple[Estimate, float]]:
    """Returns each way's difference from the baseline, paired by seed, and its p value, corrected for all of them.

    Ways that came out the same, as a quarter of A₀ and s^(-1/2) of it do at s = 16, are counted once.
    """
    differences = {name: each - of[baseline] for name, each in of.items() if name != baseline}
    unlike = {each.tobytes(): each for each in differences.values()}
    p_values = dict(zip(unlike, holm([paired_p_value(each) for each in unlike.values()]), strict=True))
    return {name: (mean_interval(each), p_values[each.tobytes()]) for name, each in differences.items()}


def chosen(setting: Setting, way: str) -> str:
    """Returns the rate that was chosen, and whether it is the first or last of the way's grid."""
    rates, index = setting.rates["AdamW" if way == EARLY else way], setting.best[way]
    return f"{rates[index]:g}" + (" (edge)" if len(rates) > 1 and index in (0, len(rates) - 1) else "")


def _told(difference: tuple[Estimate, float] | None) -> tuple[str, str]:
    return (tables.number(difference[0], 4), pilot.p_text(difference[1])) if difference else ("-", "-")


def _wide(nats: np.ndarray) -> int:
    """Returns how many rates are close to the best of them."""
    valley = nats[:, :, -1].mean((1, 2))
    return int((valley <= valley.min() + WIDE).sum())


def draw(path: Path, settings: list[Setting]) -> None:
    """Writes the figure: a column per table; above, nats per byte over η, below, over the run, each at its chosen η."""
    figure = Figure(figsize=(5 * len(settings), 8.8), layout="constrained")
    above, below = figure.subplots(2, len(settings), squeeze=False)
    for ax, under, each in zip(above, below, settings, strict=True):
        low = np.inf
        for number, (way, of_seeds) in enumerate(each.nats.items()):
            nats = of_seeds.mean((1, 3))
            low = min(low, nats[:, -1].min())
            line = {"color": f"C{number % 10}", "markersize": 3, "label": way}
            style, share = "o-" if number < 10 else "o--", 100 * np.arange(1, nats.shape[1] + 1) / nats.shape[1]
            ax.plot(each.rates[way], nats[:, -1], style, **line)
            under.plot(share, nats[each.best[way]], style, **line)
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="peak learning rate η", title=each.title, ylim=(low - 0.01, low + 0.3))
        under.set(xlabel="share of the run, %", title="each at its chosen η", ylim=(low - 0.01, low + 0.3))
    above[0].set_ylabel("nats per byte")
    below[0].set_ylabel("nats per byte")
    below[-1].legend(fontsize=7, handlelength=4)  # long enough to tell dashes
    figure.savefig(path, dpi=110)
