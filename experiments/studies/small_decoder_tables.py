"""The tables and the figure of `small_decoder`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.running import tables
from experiments.running.markdown import markdown
from experiments.studies import pilot
from stable_lora_jax.evaluation import holm, mean_interval, paired_p_value
from stable_lora_jax.training import read_metrics

WIDE, EARLY = 0.01, "AdamW, stopped early"
LEGEND = f"""\
Nats per byte on windows of ARC-Easy's test split. *Minus AdamW*: mean difference over runs of the same seed, with
half a 95 % interval over the seeds (Student's t); at the rate that is best on one half of the windows, on the other
half, and as the mean of the whole grid. p values are of paired t tests, corrected (Holm) within a column of a table.
*Wide*: rates of the grid within {WIDE} of the way's own best. {EARLY}: rate and step are chosen together.
"""


def report(results: Path) -> str:
    """Returns the tables, one per setting and scale, and draws the figure."""
    lines = read_metrics(results / "small_decoder.jsonl")
    text, shown = "", {}
    for (setting, scale), group in tables.grouped(lines, lambda line: (line["setting"], line["scale"])).items():
        found = {way: over_all_rates(of_way) for way, of_way in tables.grouped(group, lambda line: line["way"]).items()}
        if "AdamW" not in found:
            continue
        rates, title = sorted({rate for line in group for rate in line["rates"]}), f"{setting}, s = {scale:g}"
        best = {name: int(nats[..., -1, 0].mean(1).argmin()) for name, nats in found.items()}
        at_best = {name: nats[best[name], :, -1, 1] for name, nats in found.items()}
        over_rates = {name: nats[:, :, -1].mean((0, 2)) for name, nats in found.items()}
        rate, mark = np.unravel_index(found["AdamW"][..., 0].mean(1).argmin(), (len(rates), found["AdamW"].shape[2]))
        at_best[EARLY] = found["AdamW"][rate, :, mark, 1]
        best[EARLY] = int(rate)
        columns = [_minus(of, "AdamW") for of in (at_best, over_rates)]
        rows = []
        for name in at_best:
            wide = "-"
            if name in found:
                valley = found[name][:, :, -1].mean((1, 2))
                wide = str(int((valley <= valley.min() + WIDE).sum()))
            compared = [cell for column in columns for cell in column.get(name, ("-", "-"))]
            rows.append([name, f"{rates[best[name]]:g}", f"{at_best[name].mean():.4f}", *compared, wide])
        header = ("way", "chosen η", "nats per byte", "minus AdamW", "p", "mean of rates minus AdamW", "p", "wide")
        runs = f"{group[0]['steps']} steps, {tables.seeds_text(found['AdamW'].shape[1])}"
        text += f"**{title}**, {runs}\n\n{markdown(header, rows)}\n\n"
        shown[title] = {name: (rates, nats.mean((1, 3)), best[name]) for name, nats in found.items()}
    if not text:
        return ""
    draw(results / "small_decoder.png", shown)
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


def _minus(of: dict[str, np.ndarray], baseline: str) -> dict[str, tuple[str, str]]:
    """Returns each way's difference from the baseline, paired by seed, and its corrected p value."""
    differences = {name: each - of[baseline] for name, each in of.items() if name != baseline}
    p_values = holm([paired_p_value(each) for each in differences.values()])
    return {
        name: (tables.number(mean_interval(each), 4), pilot.p_text(p))
        for (name, each), p in zip(differences.items(), p_values, strict=True)
    }


def draw(path: Path, shown: dict[str, dict[str, tuple[list[float], np.ndarray, int]]]) -> None:
    """Writes the figure: a column per table; above, nats per byte over η, below, over the run, each at its chosen η.

    Args:
      path: the file.
      shown: title -> way -> (its rates, its nats (rates, marks), the chosen rate's index).
    """
    figure = Figure(figsize=(5 * len(shown), 8.8), layout="constrained")
    above, below = figure.subplots(2, len(shown), squeeze=False)
    for ax, under, (title, found) in zip(above, below, shown.items(), strict=True):
        for number, (name, (rates, nats, chosen)) in enumerate(found.items()):
            line = {"color": f"C{number % 10}", "markersize": 3, "label": name}
            style, share = "o-" if number < 10 else "o--", 100 * np.arange(1, nats.shape[1] + 1) / nats.shape[1]
            ax.plot(rates, nats[:, -1], style, **line)
            under.plot(share, nats[chosen], style, **line)
        low = min(nats[:, -1].min() for _, nats, _ in found.values())
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="peak learning rate η", title=title, ylim=(low - 0.01, low + 0.3))
        under.set(xlabel="share of the run, %", title="each at its chosen η", ylim=(low - 0.01, low + 0.3))
    above[0].set_ylabel("nats per byte")
    below[0].set_ylabel("nats per byte")
    below[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
