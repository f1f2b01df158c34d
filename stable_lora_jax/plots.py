"""Figures of a run, from its metrics.jsonl alone: how each pair's norms and gap move, and where it becomes stable."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stable_lora_jax.extras import needs
from stable_lora_jax.locations import location
from stable_lora_jax.training.metrics import stop_steps
from stable_lora_jax.training.run_directory import RunDirectory, run_labels

with needs("train"):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

_ROWS = (("norm_a", "‖A‖"), ("norm_b", "‖B‖"), ("gap", "gap = (‖A‖/n) / (‖B‖/m)"))


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
    steps, pairs, stops = [line["step"] for line in records], list(records[0]["norms"]), stop_steps(lines)
    figure = Figure(figsize=(4.2 * len(pairs) + 0.8, 8), layout="constrained")
    axes = figure.subplots(len(_ROWS), len(pairs), sharex=True, sharey="row", squeeze=False)
    for column, pair in enumerate(pairs):
        for row, (field, label) in enumerate(_ROWS):
            ax = axes[row, column]
            _draw_layers(ax, steps, [line["norms"][pair][field] for line in records], stops.get(pair, {}))
            if field == "gap":
                ax.set(yscale="log", xlabel="step")
                ax.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            if column == 0:
                ax.set_ylabel(label)
        axes[0, column].set_title(_title(pair))
    dots = ", dots: the layer's shrink stopped" if any(stops.values()) else ""
    figure.suptitle(f"{run.name}: one line per layer (dark: first){dots}")
    return figure


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


def _draw_layers(ax: Any, steps: list[int], values: list[Any], stops: dict[tuple[int, ...], int]) -> None:
    """Draws one line per matrix of a stack; null, which is an infinite gap, is left out."""
    grid = np.array(values, dtype=float).reshape(len(steps), -1)
    stack = np.array(values, dtype=object).shape[1:]
    colors = _shades(grid.shape[1])
    for layer in range(grid.shape[1]):
        ax.plot(steps, grid[:, layer], color=colors[layer], linewidth=0.9)
        index = tuple(int(i) for i in np.unravel_index(layer, stack)) if stack else ()
        known = np.isfinite(grid[:, layer])
        if index in stops and known.any():
            height = np.interp(stops[index], np.array(steps)[known], grid[known, layer])
            ax.plot([stops[index]], [height], marker="o", markersize=3.5, color=colors[layer], zorder=3)


def _shades(count: int) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0, 0.9, count))


def _title(pair: str) -> str:
    parts = [part for part in pair.split("/") if part not in ("layers", "lora")]
    return ".".join(parts) or pair


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = RunDirectory(run).metrics()
    if not lines:
        raise ValueError(f"{run} holds no metrics.jsonl with at least one line. Give the directory of a run.")
    return lines
