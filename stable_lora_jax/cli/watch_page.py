"""The page of ``stable-lora watch``: one HTML file with the figures in it."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stable_lora_jax.cli.summaries import stops, validated
from stable_lora_jax.finetune import options_of
from stable_lora_jax.training import RunDirectory, run_labels
from stable_lora_jax.training.figures import plot_losses, plot_norms


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
    if best := validated(lines):
        told += f", {best}"
    parts = [
        "" if alone else f"<h1>{html.escape(label)}</h1>",
        f"<p>{told}.</p><h2>Norms and gap</h2>{_svg(plot_norms(run))}<h2>Stop steps</h2>",
        _html_table(("module", "layers stable", "first", "median", "last"), stops(lines)),
        "<h2>Configuration</h2>",
        _html_table(("option", "value"), list(options_of(record.get("config", {})).items())),
    ]
    return "\n".join(parts)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _html_table(header: tuple[str, ...], rows: list[Any]) -> str:
    def row(cells: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(each, 'td') for each in rows)}</table>"
