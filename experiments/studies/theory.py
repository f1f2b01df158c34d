"""Theorem 3.1 of arXiv 2603.05204 and how it is held against sizes that were measured.

A quantity v = Θ(n^γ) in the width n. With η ∝ n^(-c) and s ∝ n^(2c-1), so that γ[s] + 2γ[η] + 1 = 0, the theorem holds
for c <= 1: ΔY keeps its size at every width. For c = 3/2, small learning rates, A₀'s outputs (γ = 0) drown what is
learned (γ = -1/2): δ₁ and ΔY explode with γ = 1/2, unless A₀ has been erased.

The theory assumes steps like those of sign descent. While A shrinks, B's gradient shrinks with it, by 1 - λ a step, and
Adam's second moment remembers the larger gradients of the last 1/(1 - b2) steps: if that is longer than 1/λ, B's steps
become small. So Stable-LoRA is measured with the usual b2 = 0.999 and with a short memory, b2 = 0.9. That this is the
cause has not been tested apart.

The constants, λ and b2 = 0.9 were chosen on the single layer of `width_scaling`, in four rounds of looking at
results, with other random numbers. In the first, with one η and s for every c, AdamW missed its predictions at c = 3/2,
because learning and not A₀ ruled at these widths; b2 = 0.999 missed them in all rounds that followed.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.running import tables
from experiments.running.cells import append, lines_sharing
from experiments.running.markdown import markdown
from experiments.running.provenance import provenance
from stable_lora_jax.evaluation import mean_interval

NAMES = ("A Z", "B", "δ₁", "δ₂", "δ₃", "ΔY")
RANK = 8
# method -> Adam's b2
METHODS = {"adamw": 0.999, "stable-lora": 0.999, "stable-lora, b2 = 0.9": 0.9}


def predicted(c: float, method: str) -> dict[str, float]:
    """Returns γ by theorem 3.1 and its recursion: γ[A_t Z] = max(γ[A₀ Z], γ[η] + 1), γ[A₀ Z] = 0 until it is erased."""
    az = max(0.0, 1 - c) if method == "adamw" else 1 - c
    first = (2 * c - 1) - c + az  # γ[s] + γ[η] + γ[A Z]
    return dict(zip(NAMES, (az, -c, first, 0.0, 0.0, max(first, 0.0)), strict=True))


def constants(c: float, width: int, steps: int) -> tuple[float, float]:
    """Returns η ∝ n^(-c) and s ∝ n^(2c-1), whose sizes at width 64 theory leaves open.

    A_t Z learns about η n t, beside the 1 of A₀ Z: 100 at the last step for c = 1/2, 0.1 for c = 3/2, so that which of
    them rules at infinite width rules at these already. The outputs reach about 2 % of the teacher's, so that gradients
    keep their direction.
    """
    learned, ratio = 100 * 1000 ** (0.5 - c), width / 64
    eta, scale = learned / (64 * steps), 0.02 * 64 / (RANK * max(1, learned) * learned)
    return eta * ratio**-c, scale * ratio ** (2 * c - 1)


def sizes_of_step(z: Array, old: dict[str, Array], new: dict[str, Array], scale: Array) -> Array:
    """Returns the root mean squares of `NAMES` in a step from the old A and B to the new ones, on inputs z."""
    (az, b), (moved_az, moved_b) = ((z @ p["lora_a"], p["lora_b"]) for p in (old, new))
    terms = [az @ (moved_b - b), (moved_az - az) @ b, (moved_az - az) @ (moved_b - b)]
    sizes = [az, b, *(scale * term for term in terms), scale * sum(terms)]
    return jnp.stack([jnp.sqrt(jnp.mean(x**2)) for x in sizes])


def by_step(sizes: np.ndarray) -> dict[str, list[float]]:
    """Returns some steps, the last among them, and their sizes to five digits."""
    last = len(sizes) - 1
    kept = sorted({0, 1, 3, *(step for step in (10, 30, 100, 200, 300, 450) if step < last), last})
    return {str(step + 1): [float(f"{x:.5g}") for x in sizes[step]] for step in kept}


def measure_missing(
    file: Path,
    names: tuple[str, ...],
    wanted: Iterable[tuple[Any, list[tuple]]],
    measure: Callable[[Any], list[dict]],
    same: dict[str, Any],
) -> None:
    """Adds the lines that a file lacks.

    Args:
      file: the lines.
      names: fields that tell a line from all others.
      wanted: (what to measure, those fields' values in the lines that it gives).
      measure: what to measure -> lines.
      same: fields that all lines of the file share.

    Raises:
      ValueError: the file has lines in which they are other ones.
    """
    made_by, done = provenance(), {tuple(line[name] for name in names) for line in lines_sharing(file, same)}
    for what, keys in wanted:
        if not done.issuperset(keys):
            for line in measure(what):
                if tuple(line[name] for name in names) not in done:
                    append(file, line | made_by)


def exponents(lines: list[dict[str, Any]], step: str) -> dict[str, Any]:
    """Returns quantity -> mean slope of log size over log width, with its 95 % interval over the seeds."""
    slopes = []
    for of_seed in tables.grouped(lines, lambda line: line["seed"]).values():
        widths = [line["width"] for line in of_seed]
        sizes = np.array([line["sizes"][step] for line in of_seed])
        with np.errstate(divide="ignore"):
            slopes.append(np.polyfit(np.log(widths), np.log(sizes), 1)[0])
    return {name: mean_interval(column) for name, column in zip(NAMES, np.transpose(slopes), strict=True)}


def section(lines: list[dict[str, Any]], figure: Path) -> str:
    """Returns the table of exponents at the last step, measured and predicted, and draws the figure."""
    groups = tables.grouped(lines, lambda line: (line["c"], line["method"]))
    rows, last, outside, count = [], list(lines[0]["sizes"])[-1], 0, 0
    for (c, method), each in groups.items():
        found, expected = exponents(each, last), predicted(c, method)
        cells = []
        for name in NAMES:
            margin = (found[name].high - found[name].low) / 2
            cells.append(f"{found[name].value:.2f} ± {margin:.2f} ({expected[name]:g})")
            outside += not found[name].low <= expected[name] <= found[name].high
            count += 1
        cells.append(stops(each))
        rows.append([f"{c:g}", method, *cells])
    widths = sorted({line["width"] for line in lines})
    draw(groups, figure)
    text = f"Exponents γ in the width at step {last}, widths {widths[0]} to {widths[-1]}: measured ± 95 % over "
    text += f"{len({line['seed'] for line in lines})} seeds (theorem 3.1). "
    text += "The interval is of chance alone: it does not say how far the sizes are from a power law. "
    text += f"The prediction lies outside of {outside} of {count} intervals.\n\n"
    return text + markdown(("c", "method", *NAMES, "stable"), rows) + f"\n\n![exponents]({figure.name})\n\n"


def stops(lines: list[dict[str, Any]]) -> str:
    """Returns how many runs became stable, and the median step at which they did at the least and the largest width."""
    reached = tables.grouped((line for line in lines if line["stable_at"]), lambda line: line["width"])
    if not reached:
        return "-"
    ends = dict.fromkeys((min(reached), max(reached)))
    told = [f"{int(np.median([line['stable_at'] for line in reached[n]]))} at n = {n}" for n in ends]
    return f"{sum(map(len, reached.values()))} of {len(lines)}, step {' to '.join(told)}"


def draw(groups: dict[Any, list[dict[str, Any]]], path: Path) -> None:
    """Writes a figure: for each c the sizes over the width at the last step, the slopes fitted and those predicted."""
    from matplotlib.figure import Figure

    exponents_of_rate = sorted({c for c, _ in groups})
    figure = Figure(figsize=(2.7 * len(NAMES), 2.6 * len(exponents_of_rate)), layout="constrained")
    axes = figure.subplots(len(exponents_of_rate), len(NAMES), squeeze=False, sharex=True)
    for (c, method), lines in groups.items():
        row, color = axes[exponents_of_rate.index(c)], f"C{list(METHODS).index(method)}"
        last, widths = list(lines[0]["sizes"])[-1], sorted({line["width"] for line in lines})
        sizes = np.array([[line["sizes"][last] for line in lines if line["width"] == width] for width in widths])
        fitted, expected = exponents(lines, last), predicted(c, method)
        for number, (name, ax) in enumerate(zip(NAMES, row, strict=True)):
            each = sizes[:, :, number]
            ax.plot(widths, each, color=color, linewidth=0.5, alpha=0.5)
            middle, found = np.exp(np.log(each).mean(1)), fitted[name]
            ax.plot(widths, middle, "o", markersize=3, color=color, label=method)
            distances = np.log(widths) - np.log(widths).mean()
            for slope, style in ((found.value, "-"), (expected[name], "--")):
                ax.plot(widths, np.exp(np.log(middle).mean() + slope * distances), style, color=color, linewidth=1)
            told = f"{found.value:.2f} ± {(found.high - found.low) / 2:.2f}"
            place = (0.03, 0.03 + 0.08 * list(METHODS).index(method))
            ax.annotate(told, place, xycoords="axes fraction", color=color, fontsize=7)
            ax.set(xscale="log", yscale="log", title=f"{name}, c = {c:g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))
    figure.supylabel("root mean square", fontsize=9)
    figure.supxlabel("width n; solid and in numbers: fitted slope ± 95 %; dashed: predicted slope", fontsize=9)
    figure.savefig(path, dpi=110)
