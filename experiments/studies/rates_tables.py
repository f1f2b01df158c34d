"""The tables of experiments.studies.rates: curves over the rates, and differences at each method's best one."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.running import tables
from experiments.running.cells import Record, read_lines
from experiments.running.markdown import markdown
from experiments.studies import pilot
from stable_lora_jax.evaluation import holm

LEGEND = """\
*At the best rate*: nats per token of the reported questions minus AdamW's, each at the rate whose held-out nats are
least over the seeds. ± is half a 95 % interval over seeds and questions together; p values of a column are corrected
(Holm). *Rates within 0.05*: whose nats are at most 0.05 above the method's own least. Only seeds that all methods and
rates of a table have are in it.
"""


def method_of(record: Record) -> str:
    """Returns how a table calls a run's method."""
    train = record["train"]
    if train["method"] == "stable-lora":
        return f"λ = {train['lam']:g}"
    if train["method"] != "adamw":
        return train["method"]
    if train.get("eval_every"):
        return pilot.EARLY
    if train["a_scale"] != 1:
        return f"A₀ × {train['a_scale']:g}"
    if train.get("decay_only_a"):
        return f"decay on A, {train['weight_decay'] * train['learning_rate']:g} per step"
    return "AdamW"


def report(results: Path) -> str:
    """Returns the tables, one per setting and scale, and draws the figure."""
    groups = tables.grouped(
        read_lines("rates", results), lambda r: (Path(r["train"]["data"]).stem, r["train"]["alpha"])
    )
    text, curves = "", {}
    for (data, alpha), lines in groups.items():
        rates = sorted({line["train"]["learning_rate"] for line in lines})
        by_cell = {(method_of(x), x["train"]["learning_rate"], x["train"]["seed"]): x for x in lines}
        methods = list(dict.fromkeys(method_of(line) for line in lines))
        methods = [name for name in methods if _whole(by_cell, name, rates, range(1))]
        seeds = [s for s in sorted({key[2] for key in by_cell}) if all(_whole(by_cell, m, rates, [s]) for m in methods)]
        if "AdamW" not in methods:
            continue

        def grid(
            name: str, field: str, rates: list = rates, seeds: list = seeds, by_cell: dict = by_cell
        ) -> np.ndarray:
            return np.array([[by_cell[name, rate, seed][field] for seed in seeds] for rate in rates], float)

        tokens = np.array(by_cell[methods[0], rates[0], seeds[0]]["tokens"], float)
        setting = pilot.Setting({name: grid(name, "log_p") for name in methods}, tokens, {})
        best = {name: int(grid(name, "held_out_nll").mean(1).argmin()) for name in methods}

        def at_best(setting: pilot.Setting, name: str, best: dict = best) -> np.ndarray:
            return setting.log_p[name][best[name]]

        others = [name for name in methods if name != "AdamW"]
        differing = {of: [pilot.compared(setting, of, name) for name in others] for of in (at_best, pilot.over_rates)}
        told = {
            name: [
                cell
                for found in differing.values()
                for cell in (pilot.told(found[i][0]), pilot.p_text(holm([p for _, p in found])[i]))
            ]
            for i, name in enumerate(others)
        }
        rows = [
            (
                name,
                *(f"{nats:.3f}" for nats in setting.nats(name).mean(1)),
                f"{rates[best[name]]:g}",
                *told.get(name, ["-"] * 4),
                pilot.width(setting, name),
            )
            for name in methods
        ]
        title = f"{data.partition('-')[0]}, s = {alpha / lines[0]['train']['rank']:g}"
        header = (
            "nats per token",
            *(f"η = {rate:g}" for rate in rates),
            "chosen η",
            "at the best rate, minus AdamW",
            "p",
        )
        header += ("mean of the rates, minus AdamW", "p", f"rates within {pilot.WIDE}")
        text += f"**{title}**, {len(tokens)} questions, {len(seeds)} seeds\n\n{markdown(header, rows)}\n\n"
        curves[title] = rates, {name: setting.nats(name).mean(1) for name in methods}
    if not text:
        return ""
    draw(results / "rates.png", curves)
    return f"{text}{LEGEND}\n![nats per token over the learning rate](rates.png)\n"


def draw(path: Path, curves: dict[str, tuple[list[float], dict[str, np.ndarray]]]) -> None:
    """Writes the figure: a panel per table, nats per token over η."""
    figure = Figure(figsize=(4.4 * len(curves), 4), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (title, (rates, found)) in zip(axes, curves.items(), strict=True):
        for name, nats in found.items():
            ax.plot(rates, nats, marker="o", markersize=3.5, label=name)
        ax.set(xscale="log", xlabel="peak learning rate η", title=title)
    axes[0].set_ylabel("nats per token of the right answers")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _whole(by_cell: dict, method: str, rates: list[float], seeds: Iterable[int]) -> bool:
    return all((method, rate, seed) in by_cell for rate in rates for seed in seeds)
