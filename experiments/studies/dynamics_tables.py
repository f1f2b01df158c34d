"""The table of experiments.studies.dynamics, steps until stable, and its figure, norms and terms over the steps."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.running import tables
from experiments.running.cells import Record, read_lines
from experiments.running.markdown import markdown

# What is recorded of every pair -> its label.
FIELDS = {"norm_a": "‖A‖", "norm_b": "‖B‖", "gap": "gap", "delta_1": "δ₁ = s ‖A ΔB‖", "delta_2": "δ₂ = s ‖ΔA B‖"}
HEADER = ("run", "module", "stable", "step, first third of layers", "middle", "last", "accuracy, %", "nats a token")


def report(results: Path) -> str:
    """Returns the table of steps until stable, medians over thirds of the layers, and draws the figure."""
    records = read_lines("dynamics", results)
    if not (whole := [record for record in records if "failed" not in record]):
        return ""
    rows = []
    for record in whole:
        for pair, steps in record["stable_at"].items():
            thirds = [[step for step in part if step] for part in np.array_split(np.array(steps), 3)]
            shrinks = "lam" in record["train"]
            rows.append([_name(record), pair.split("/")[-2]])
            rows[-1].append(f"{np.count_nonzero(steps)} of {len(steps)}" if shrinks else "-")
            rows[-1] += [int(np.median(part)) if part else "-" for part in thirds]
            rows[-1] += [f"{100 * record['accuracy_token']:.1f}", f"{record['nll_token']:.3f}"]
    draw(whole, results / "dynamics.png")
    return f"{markdown(HEADER, rows)}\n\n![norms and terms](dynamics.png)\n\n{tables.failures(records)}"


def _name(record: Record) -> str:
    lam, rate = record["train"].get("lam"), record["train"]["learning_rate"]
    return f"{'AdamW' if lam is None else f'λ = {lam:g}'}, η = {rate:g}, s = {_scale(record):g}"


def _scale(record: Record) -> float:
    """Returns s."""
    return record["train"]["alpha"] / record["train"]["rank"]


def draw(records: list[Record], path: Path) -> None:
    """Writes a figure: a row per run, a column per module; medians over the layers, shaded between the quartiles.

    A dotted line stands at the median step at which matrices stopped.
    """
    pairs = [pair for pair in records[0]["series"] if pair != "steps"]
    figure = Figure(figsize=(5 * len(pairs), 2.6 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), len(pairs), squeeze=False, sharey=True)
    for record, row in zip(records, axes, strict=True):
        for pair, ax in zip(pairs, row, strict=True):
            for number, (name, label) in enumerate((k, v) for k, v in FIELDS.items() if k != "gap"):
                known = zip(record["series"]["steps"], record["series"][pair][name], strict=True)
                points = [(step, *quartiles) for step, quartiles in known if quartiles and quartiles[1] > 0]
                if points:
                    steps, *sizes = np.array(points).T
                    low, middle, high = _scale(record) * np.array(sizes) if name.startswith("delta") else sizes
                    ax.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
                    ax.plot(steps, middle, color=f"C{number}", label=label)
            if stops := [step for step in record["stable_at"][pair] if step]:
                ax.axvline(float(np.median(stops)), color="black", linewidth=0.8, linestyle=":")
            ax.set(
                yscale="log", xlabel="step", ylabel="Frobenius norm", title=f"{_name(record)}: {pair.split('/')[-2]}"
            )
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
