"""``stable-lora watch``: the dynamics of a running or finished run, in the terminal and as a page."""

import html
import io
import statistics
import time
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
from stable_lora_jax.plots import plot_losses, plot_norms
from stable_lora_jax.training import RunDirectory, stop_steps

_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 20  # steps that the told loss is a mean of


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Follow a run: loss, norms and gap of every module, and which layers are stable. Ctrl-C ends the watching."""

    run: Positional[Path]
    """A run directory."""
    once: bool = False
    """Show how things stand, and end."""
    every: float = 2.0
    """Seconds between two looks."""
    html: Path | None = None
    """Write a page with the figures to this file too, anew at every look; it needs no other file."""

    def __post_init__(self):
        if not self.every > 0:
            raise ValueError(f"every={self.every} is not a positive number of seconds.")


def watch_command(config: WatchConfig) -> None:
    """Runs `stable-lora watch`; see `WatchConfig`."""
    if not config.run.is_dir():
        raise ValueError(f"There is no run directory {config.run}. Give the one that `stable-lora train` was given.")
    with suppress(KeyboardInterrupt), Live(console=Console(), auto_refresh=False) as live:
        while True:
            done = (
                config.once or RunDirectory(config.run).is_finished
            )  # asked first, so that the last look shows the end
            lines = RunDirectory(config.run).metrics()
            if any("loss" in line for line in lines):
                live.update(_view(config.run, lines), refresh=True)
                if config.html and any("norms" in line for line in lines):
                    _write(config.html, page(config.run, again_after=None if done else config.every))
            else:
                live.update(Text(f"{config.run} has no step yet"), refresh=True)
            if done:
                return
            time.sleep(config.every)


def page(run: Path, again_after: float | None = None) -> str:
    """Returns an HTML page about a run: its configuration, loss, norms and gap by layer, and the stop steps.

    Args:
      run: a run directory with metrics.jsonl.
      again_after: seconds after which the browser loads the page again; never if None.

    Raises:
      ValueError: no loss or no norms are recorded there yet.
    """
    figures = {"Loss": plot_losses({run.name: run}), "Norms and gap": plot_norms(run)}
    lines, record = RunDirectory(run).metrics(), RunDirectory(run).record()
    last, name = [line for line in lines if "loss" in line][-1], html.escape(run.name)
    again = "" if again_after is None else f'<meta http-equiv="refresh" content="{max(1, round(again_after))}">'
    told = f"Step {last['step']} of {record.get('total_steps', '?')}, loss {last['loss']:.4f}"
    if last["pairs"]:
        told += f", stable pairs {last['stable']}/{last['pairs']}"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}<title>{name}</title>',
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
        "svg{max-width:100%;height:auto}table{border-collapse:collapse}td,th{padding:.1rem .8rem .1rem 0;"
        "text-align:left;font-variant-numeric:tabular-nums}</style></head><body>",
        f"<h1>{name}</h1><p>{told}.</p>",
        *(f"<h2>{title}</h2>{_svg(figure)}" for title, figure in figures.items()),
        "<h2>Stop steps</h2>",
        _html_table(("module", "layers stable", "first", "median", "last"), _stops(lines)),
        "<h2>Configuration</h2>",
        _html_table(("option", "value"), list(options_of(record.get("config", {})).items())),
        "</body></html>",
    ]
    return "\n".join(parts)


def _view(run: Path, lines: list[dict[str, Any]]) -> RenderableType:
    """Returns what the terminal shows of a run with at least one step."""
    record, losses = RunDirectory(run).record(), [line for line in lines if "loss" in line]
    norms = next((line["norms"] for line in reversed(lines) if "norms" in line), {})
    recent = statistics.fmean(line["loss"] for line in losses[-_RECENT:])
    head = Text(f"{run}  step {losses[-1]['step']}/{record.get('total_steps', '?')}", style="bold")
    head.append(f"  loss {recent:.4f}  {losses[-1]['tokens_per_second']:.0f} tok/s")
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
