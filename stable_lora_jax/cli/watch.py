"""``stable-lora watch``: the dynamics of a running or finished run, in the terminal and as a page."""

import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from stable_lora_jax.cli.summaries import stops, validated
from stable_lora_jax.locations import check_local, location
from stable_lora_jax.training import RunDirectory, run_labels

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
                from stable_lora_jax.cli.watch_page import page  # here: it brings matplotlib, half a second

                _write(config.html, page(config.runs, again_after=None if done else config.every))
            if done:
                return
            time.sleep(config.every)


def _has(lines: list[dict[str, Any]], key: str) -> bool:
    return any(key in line for line in lines)


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
    if best := validated(lines):
        head.append(f"  {best}")
    by_pair = {row[0]: row for row in stops(lines)}
    table = Table(box=None, pad_edge=False)
    for column in ("module", "‖A‖", "‖B‖", "gap, median", "smallest", "largest", "layers stable", "median stop"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for pair, values in norms.items():
        norm_a, norm_b, gap = (np.array(values[field], float).ravel() for field in ("norm_a", "norm_b", "gap"))
        gap = np.where(np.isnan(gap), np.inf, gap)  # null in the file: B is still 0
        figures = (np.median(norm_a), np.median(norm_b), np.median(gap), gap.min(), gap.max())
        _, stable, _, median, _ = by_pair.get(pair, (pair, 0, "", "", ""))
        counts = (f"{stable}/{gap.size}", str(median)) if losses[-1]["pairs"] else ("-", "-")
        table.add_row(pair, *(f"{figure:.4g}" for figure in figures), *counts)
    return Group(head, Text(_sparkline([line["loss"] for line in losses])), table)


def _sparkline(values: list[float], width: int = 72) -> str:
    """Returns the values as a line of bars, each the mean of its share.

    Examples:
      >>> _sparkline([3.0, 2.0, 1.0], width=3)
      '█▅▁'
    """
    shares = np.array([np.mean(part) for part in np.array_split(values, min(width, len(values)))])
    spread = np.ptp(shares) or 1.0
    return "".join(_BARS[round(x)] for x in (shares - shares.min()) / spread * (len(_BARS) - 1))


def _write(file: Path, text: str) -> None:
    """Replaces a file at once, so that a browser never reads half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)
