"""Figures of a run, from its metrics.jsonl alone: how each pair's norms and gap move, and where it becomes stable."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stable_lora_jax.locations import location
from stable_lora_jax.plots import draw_norms
from stable_lora_jax.training.metrics import stop_steps
from stable_lora_jax.training.run_directory import RunDirectory, run_labels


def save_figures(runs: Sequence[Path], out: Path | None = None, file_format: str = "png") -> list[Path]:
    """Draws norms and gap of each run and the losses of all, and returns the files written.

    Args:
      runs: run directories.
      out: folder for the figures; each run's own, and the first run's for the losses, if None.
      file_format: png, svg or pdf.
    """
    figures, labels = {}, run_labels(runs)
    for label, run in labels.items():
        stem = "norms" if out is None else f"{label.replace('/', '-')}-norms"
        file, number = (out or run) / f"{stem}.{file_format}", 1
        while file in figures:  # the same name once its slashes are hyphens
            number += 1
            file = file.with_name(f"{stem}-{number}.{file_format}")
        figures[file] = plot_norms(run)
    losses = plot_losses(labels)
    figures[(out or runs[0]) / f"losses.{file_format}"] = losses
    for path, figure in figures.items():
        file = location(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format=file_format)
        file.write_bytes(content.getvalue())
    return list(figures)


def plot_norms(run: Path) -> Figure:
    """Returns ‖A‖, ‖B‖ and gap over the steps: a column per module, a line per layer, a dot where the layer stopped.

    Args:
      run: a run directory.

    Raises:
      ValueError: no norms are recorded there.
    """
    lines = _lines(run)
    records = [line for line in lines if "norms" in line]
    if not records:
        raise ValueError(f"{run}/metrics.jsonl holds no norms. Train with --norms-every 10, say.")
    steps, values, stops = [line["step"] for line in records], {}, {}
    for pair, first in records[0]["norms"].items():
        stack = np.shape(first["norm_a"])
        values[pair] = {  # null, an infinite gap, becomes NaN
            field: np.array([line["norms"][pair][field] for line in records], float).reshape(len(steps), -1)
            for field in ("norm_a", "norm_b", "gap")
        }
        found = stop_steps(lines).get(pair, {})
        stops[pair] = {int(np.ravel_multi_index(index, stack)) if stack else 0: step for index, step in found.items()}
    return draw_norms(steps, values, stops, run.name)


def plot_losses(runs: Mapping[str, Path]) -> Figure:
    """Returns the training loss of several runs over the steps, with a running mean of 20 steps, and validation losses.

    Args:
      runs: label -> run directory.

    Raises:
      ValueError: a directory without metrics.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for number, (label, run) in enumerate(runs.items()):
        lines = [line for line in _lines(run) if "loss" in line]
        if not lines:
            raise ValueError(f"{run}/metrics.jsonl holds no loss yet. Wait for the first step.")
        steps, losses = [line["step"] for line in lines], np.array([line["loss"] for line in lines], float)
        width = min(20, len(losses))
        ax.plot(steps, losses, color=f"C{number}", alpha=0.25, linewidth=0.8)
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        ax.plot(steps[width - 1 :], mean, color=f"C{number}", label=label)
        if validated := {line["step"]: line["validation"]["loss"] for line in _lines(run) if "validation" in line}:
            ax.plot(*zip(*validated.items(), strict=True), "o--", color=f"C{number}", label=f"{label}, validation")
    ax.set(xlabel="step", ylabel="training loss, nats")
    ax.legend()
    return figure


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = RunDirectory(run).metrics()
    if not lines:
        raise ValueError(f"{run} holds no metrics.jsonl with at least one line. Give the directory of a run.")
    return lines
