"""``stable-lora watch``: the dynamics of a running or finished run, in the terminal and as a page."""

import html
import io
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from stable_lora_jax.finetune import options_of
from stable_lora_jax.locations import check_local, location
from stable_lora_jax.plots import plot_losses, plot_norms, run_labels
from stable_lora_jax.training import RunDirectory, stop_steps

_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 20  # steps that the told loss is a mean of


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Follow a run: loss, norms and gap of every module, and which layers are stable. Several runs get a row each."""

    runs: Positional[tuple[Path, ...]]
    """Run directories."""
    once: bool = False
    """Show how things stand, and end."""
    every: float = 2.0
    """Seconds between two looks."""
    html: Path | None = None
    """Write a page with the figures to this file too, anew at every look; it needs no other file."""

    def __post_init__(self):
        check_local(html=self.html)
        if not self.every > 0:
            raise ValueError(f"every={self.every} is not a positive number of seconds.")
        if not self.runs:
            raise ValueError("There is nothing to watch. Give a run directory, or several.")


def watch_command(config: WatchConfig) -> None:
    """Runs `stable-lora watch`; see `WatchConfig`."""
    if missing := [str(run) for run in config.runs if not location(run).is_dir()]:
        raise ValueError(
            f"There is no run directory {', '.join(missing)}. Give the one that `stable-lora train` was given."
        )
    with suppress(KeyboardInterrupt), Live(console=Console(), auto_refresh=False) as live:
        while True:
            # Asked first, so that the last look shows the end.
            done = config.once or all(RunDirectory(run).is_finished for run in config.runs)
            found = {run: RunDirectory(run).metrics() for run in config.runs}
            live.update(_view(*next(iter(found.items()))) if len(found) == 1 else _compared(found), refresh=True)
            if config.html and all(_has(lines, "loss") and _has(lines, "norms") for lines in found.values()):
                _write(config.html, page(config.runs, again_after=None if done else config.every))
            if done:
                return
            time.sleep(config.every)


def page(runs: Sequence[Path], again_after: float | None = None) -> str:
    """Returns an HTML page about runs: losses, and of each its norms and gap by layer, stop steps and configuration.

    Args:
      runs: run directories with metrics.jsonl.
      again_after: seconds after which the browser loads the page again; never if None.

    Raises:
      ValueError: no loss or no norms are recorded there yet.
    """
    name = html.escape(", ".join(run.name for run in runs))
    again = "" if again_after is None else f'<meta http-equiv="refresh" content="{max(1, round(again_after))}">'
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}<title>{name}</title>',
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
        "svg{max-width:100%;height:auto}table{border-collapse:collapse}td,th{padding:.1rem .8rem .1rem 0;"
        "text-align:left;font-variant-numeric:tabular-nums}</style></head><body>",
        f"<h1>{name}</h1><h2>Loss</h2>{_svg(plot_losses(run_labels(runs)))}",
        *(_section(label, run, alone=len(runs) == 1) for label, run in run_labels(runs).items()),
        "</body></html>",
    ]
    return "\n".join(parts)


def _section(label: str, run: Path, *, alone: bool) -> str:
    """Returns what the page says of one run."""
    lines, record = RunDirectory(run).metrics(), RunDirectory(run).record()
    last = [line for line in lines if "loss" in line][-1]
    told = f"Step {last['step']} of {record.get('total_steps', '?')}, loss {last['loss']:.4f}"
    if last["pairs"]:
        told += f", stable pairs {last['stable']}/{last['pairs']}"
    if validated := _validated(lines):
        told += f", {validated}"
    parts = [
        "" if alone else f"<h1>{html.escape(label)}</h1>",
        f"<p>{told}.</p><h2>Norms and gap</h2>{_svg(plot_norms(run))}<h2>Stop steps</h2>",
        _html_table(("module", "layers stable", "first", "median", "last"), _stops(lines)),
        "<h2>Configuration</h2>",
        _html_table(("option", "value"), list(options_of(record.get("config", {})).items())),
    ]
    return "\n".join(parts)


def _has(lines: list[dict[str, Any]], key: str) -> bool:
    return any(key in line for line in lines)


def _validated(lines: list[dict[str, Any]]) -> str:
    """Returns the last validation as text, and the best one; nothing without."""
    found = [(line["validation"], line["step"]) for line in lines if "validation" in line]
    if not found:
        return ""
    last, (best, step) = found[-1][0], min(found, key=lambda each: each[0]["loss"])
    accuracy = f", accuracy {last['accuracy']:.3f}" if "accuracy" in last else ""
    return f"validation {last['loss']:.4f}{accuracy}, lowest {best['loss']:.4f} at step {step}"


def _compared(found: Mapping[Path, list[dict[str, Any]]]) -> RenderableType:
    """Returns what the terminal shows of several runs: a row each."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "step", "loss", "validation, lowest", "at step", "gap, median", "stable", "tok/s"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for label, run in run_labels(list(found)).items():
        lines = found[run]
        losses = [line for line in lines if "loss" in line]
        if not losses:
            table.add_row(label, "-")
            continue
        norms = next((line["norms"] for line in reversed(lines) if "norms" in line), {})
        gaps = [np.array(values["gap"], float).ravel() for values in norms.values()]  # null, so NaN, while B is 0
        gap = np.median(np.nan_to_num(np.concatenate(gaps), nan=np.inf)) if gaps else np.nan
        validated = [(line["validation"]["loss"], line["step"]) for line in lines if "validation" in line]
        best = min(validated) if validated else None
        last = losses[-1]
        table.add_row(
            label,
            f"{last['step']}/{RunDirectory(run).record().get('total_steps', '?')}",
            f"{statistics.fmean(line['loss'] for line in losses[-_RECENT:]):.4f}",
            *((f"{best[0]:.4f}", str(best[1])) if best else ("-", "-")),
            f"{gap:.4g}",
            f"{last['stable']}/{last['pairs']}" if last["pairs"] else "-",
            f"{last['tokens_per_second']:.0f}",
        )
    return table


def _view(run: Path, lines: list[dict[str, Any]]) -> RenderableType:
    """Returns what the terminal shows of one run."""
    if not _has(lines, "loss"):
        return Text(f"{run} has no step yet")
    record, losses = RunDirectory(run).record(), [line for line in lines if "loss" in line]
    norms = next((line["norms"] for line in reversed(lines) if "norms" in line), {})
    recent = statistics.fmean(line["loss"] for line in losses[-_RECENT:])
    head = Text(f"{run}  step {losses[-1]['step']}/{record.get('total_steps', '?')}", style="bold")
    head.append(f"  loss {recent:.4f}  {losses[-1]['tokens_per_second']:.0f} tok/s")
    if validated := _validated(lines):
        head.append(f"  {validated}")
    stops = {row[0]: row for row in _stops(lines)}
    table = Table(box=None, pad_edge=False)
    for column in ("module", "‖A‖", "‖B‖", "gap, median", "smallest", "largest", "layers stable", "median stop"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for pair, values in norms.items():
        norm_a, norm_b, gap = (np.array(values[field], float).ravel() for field in ("norm_a", "norm_b", "gap"))
        gap = np.where(np.isnan(gap), np.inf, gap)  # null in the file: B is still 0
        figures = (np.median(norm_a), np.median(norm_b), np.median(gap), gap.min(), gap.max())
        _, stable, _, median, _ = stops.get(pair, (pair, 0, "", "", ""))
        counts = (f"{stable}/{gap.size}", str(median)) if losses[-1]["pairs"] else ("-", "-")
        table.add_row(pair, *(f"{figure:.4g}" for figure in figures), *counts)
    return Group(head, Text(_sparkline([line["loss"] for line in losses])), table)


def _stops(lines: list[dict[str, Any]]) -> list[tuple[str, int, int, int, int]]:
    """Returns (pair, stable matrices, first, median and last stop step) of every pair with one that is stable."""
    each = {pair: sorted(steps.values()) for pair, steps in stop_steps(lines).items()}
    return [(pair, len(s), s[0], round(statistics.median(s)), s[-1]) for pair, s in each.items()]


def _sparkline(values: list[float], width: int = 72) -> str:
    """Returns the values as a line of bars, each the mean of its share.

    >>> _sparkline([3.0, 2.0, 1.0], width=3)
    '█▅▁'
    """
    shares = np.array([np.mean(part) for part in np.array_split(values, min(width, len(values)))])
    spread = np.ptp(shares) or 1.0
    return "".join(_BARS[round(x)] for x in (shares - shares.min()) / spread * (len(_BARS) - 1))


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _html_table(header: tuple[str, ...], rows: list[Any]) -> str:
    def row(cells: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(each, 'td') for each in rows)}</table>"


def _write(file: Path, text: str) -> None:
    """Replaces a file at once, so that a browser never reads half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)
