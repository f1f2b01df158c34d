"""Width scaling: the exponents of the paper's theory (section 3, theorem 3.1), measured, beside its prediction.

Question:  v = Θ(n^γ): with which γ do A_t Z, B_t, δ₁, δ₂, δ₃ and ΔY grow with the width n, for AdamW and Stable-LoRA?
Command:   python -m experiments.width_scaling       (--help)
Hardware:  2 CPU cores, 2 GB. Minutes: 1.
Expected:  the table's predictions, +- 0.15. With η ∝ n^(-c) and s ∝ n^(2c-1), so that γ[s] + 2γ[η] + 1 = 0, theorem 3.1
           holds for c <= 1. For c = 3/2, small learning rates, A₀'s outputs (γ = 0) drown what is learned (γ = -1/2):
           δ₁ and ΔY then explode with γ = 1/2 under AdamW, and not once Stable-LoRA has erased A₀. One disagreement:
           with b2 = 0.999 (below) Stable-LoRA's B and ΔY are then not stable but vanish, ΔY with γ = -0.6.

A teacher adds x U V (rank 4, outputs of order 1) to a frozen layer n -> n, a student s x A B; the layer itself cancels
in their difference and is left out. The batch is fixed, the loss a sum over outputs, Adam's eps so small that it plays
no role at any width. Measured: root mean squares over entries, on the training inputs.

The theory assumes steps like those of sign descent. While A shrinks, B's gradient shrinks with it, by 1 - λ a step, and
Adam's second moment remembers the larger gradients of the last 1/(1 - b2) steps: if that is longer than 1/λ, B's steps
become small. So Stable-LoRA is measured with the usual b2 = 0.999 and with a short memory, b2 = 0.9. That this is the
cause has not been tested apart.

The constants (below), λ and b2 = 0.9 were chosen in four rounds of looking at results, with other random numbers. In
the first, with one η and s for every c, AdamW missed its predictions at c = 3/2, because learning and not A₀ ruled at
these widths; b2 = 0.999 missed them in all rounds that followed. The lines are of fresh teachers, inputs and starts.
"""

import itertools
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array

from experiments import tables
from experiments.cells import append, provenance
from stable_lora_jax import stability, stable_lora_shrink
from stable_lora_jax.evaluation import mean_interval
from stable_lora_jax.lora.linear import A_INIT
from stable_lora_jax.training import read_metrics

NAMES = ("A Z", "B", "δ₁", "δ₂", "δ₃", "ΔY")
BATCH, RANK = 16, 8
# method -> Adam's b2
METHODS = {"adamw": 0.999, "stable-lora": 0.999, "stable-lora, b2 = 0.9": 0.9}


@dataclass(frozen=True, kw_only=True)
class WidthConfig:
    """Train students of many widths, and fit exponents."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """n."""
    exponents: tuple[float, ...] = (0.5, 1.0, 1.5)
    """c, in η ∝ n^(-c)."""
    seeds: int = 5
    """Teachers, inputs and starts."""
    steps: int = 600
    """The table and the figure show the last; some before are recorded too."""
    lam: float = 0.05
    """λ of Stable-LoRA: large, so that every width is stable in the first half of the steps."""
    results: Path = Path("experiments/results")
    """Folder of the lines, table and figure."""
    smoke: bool = False
    """Two narrow widths, four steps."""


def predicted(c: float, method: str) -> dict[str, float]:
    """Returns γ by theorem 3.1 and its recursion: γ[A_t Z] = max(γ[A₀ Z], γ[η] + 1), γ[A₀ Z] = 0 until it is erased."""
    az = max(0.0, 1 - c) if method == "adamw" else 1 - c
    first = (2 * c - 1) - c + az  # γ[s] + γ[η] + γ[A Z]
    return dict(zip(NAMES, (az, -c, first, 0.0, 0.0, max(first, 0.0)), strict=True))


def constants(c: float, steps: int) -> tuple[float, float]:
    """Returns η and s at width 64, which theory leaves open.

    A_t Z learns about η n t, beside the 1 of A₀ Z: 100 at the last step for c = 1/2, 0.1 for c = 3/2, so that which of
    them rules at infinite width rules at these already. The outputs reach about 2 % of the teacher's, so that gradients
    keep their direction.
    """
    learned = 100 * 1000 ** (0.5 - c)
    return learned / (64 * steps), 0.02 * 64 / (RANK * max(1, learned) * learned)


def sizes_of_step(z: Array, old: dict[str, Array], new: dict[str, Array], scale: Array) -> Array:
    """Returns the root mean squares of `NAMES` in a step from the old A and B to the new ones, on inputs z."""
    (az, b), (moved_az, moved_b) = ((z @ p["lora_a"], p["lora_b"]) for p in (old, new))
    terms = [az @ (moved_b - b), (moved_az - az) @ b, (moved_az - az) @ (moved_b - b)]
    sizes = [az, b, *(scale * term for term in terms), scale * sum(terms)]
    return jnp.stack([jnp.sqrt(jnp.mean(x**2)) for x in sizes])


@partial(jax.jit, static_argnames=("width", "steps", "shrink"))
def students(
    width: int, steps: int, eta: Array, scale: Array, lam: Array, b2: Array, keys: Array, *, shrink: bool
) -> Any:
    """Returns the measured quantities (seeds, steps, 6) and the flags (seeds, steps) of one width."""
    links = [optax.adam(eta, b2=b2, eps=1e-20), *([stable_lora_shrink(lam)] if shrink else [])]
    optimizer = optax.chain(*links)

    def of_seed(key: Array) -> tuple[Array, Array]:
        for_z, for_u, for_v, for_a = jax.random.split(key, 4)
        z = jax.random.normal(for_z, (BATCH, width))
        u = jax.random.normal(for_u, (width, 4)) / width**0.5
        target = z @ u @ jax.random.normal(for_v, (4, width)) / 2
        params = {"lora_a": A_INIT(for_a, (width, RANK), jnp.float32), "lora_b": jnp.zeros((RANK, width))}

        def loss(params: dict[str, Array]) -> Array:
            return 0.5 * jnp.sum((scale * (z @ params["lora_a"]) @ params["lora_b"] - target) ** 2)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            new: Any = optax.apply_updates(params, updates)
            stable = stability(new, state)["lora"].stable if shrink else jnp.zeros((), bool)
            return (new, state), (sizes_of_step(z, params, new, scale), stable)

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[1]

    return jax.lax.map(of_seed, keys)


def measure(config: WidthConfig, c: float, method: str, width: int) -> list[dict[str, Any]]:
    """Returns a line a seed."""
    ratio = width / 64
    eta, scale = constants(c, config.steps)
    numbers = map(jnp.float32, (eta * ratio**-c, scale * ratio ** (2 * c - 1), config.lam, METHODS[method]))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), width), config.seeds)
    sizes, stable = jax.device_get(students(width, config.steps, *numbers, keys, shrink=method != "adamw"))
    lines = []
    for seed in range(config.seeds):
        when = int(stable[seed].argmax()) + 1 if stable[seed].any() else 0
        lines.append({"c": c, "method": method, "width": width, "seed": seed, "stable_at": when})
        lines[-1]["sizes"] = by_step(sizes[seed])
    return lines


def by_step(sizes: np.ndarray) -> dict[str, list[float]]:
    """Returns some steps, the last among them, and their sizes to five digits."""
    last = len(sizes) - 1
    kept = sorted({0, 1, 3, *(step for step in (10, 30, 100, 200, 300, 450) if step < last), last})
    return {str(step + 1): [float(f"{x:.5g}") for x in sizes[step]] for step in kept}


def exponents(lines: list[dict[str, Any]], step: str) -> dict[str, Any]:
    """Returns quantity -> mean slope of log size over log width, with its 95 % interval over the seeds."""
    slopes = []
    for of_seed in tables.grouped(lines, lambda line: line["seed"]).values():
        widths = [line["width"] for line in of_seed]
        sizes = np.array([line["sizes"][step] for line in of_seed])
        with np.errstate(divide="ignore"):
            slopes.append(np.polyfit(np.log(widths), np.log(sizes), 1)[0])
    return {name: mean_interval(column) for name, column in zip(NAMES, np.transpose(slopes), strict=True)}


def report(results: Path) -> str:
    """Returns the table of exponents at the last step, and draws the figure beside the lines."""
    lines = read_metrics(results / "width_scaling.jsonl")
    return section(lines, results / "width_scaling.png") if lines else ""


def section(lines: list[dict[str, Any]], figure: Path) -> str:
    """Returns the table of exponents at the last step, measured and predicted, and draws the figure."""
    groups = tables.grouped(lines, lambda line: (line["c"], line["method"]))
    rows, last = [], list(lines[0]["sizes"])[-1]
    for (c, method), each in groups.items():
        found, expected = exponents(each, last), predicted(c, method)
        cells = []
        for name in NAMES:
            margin = (found[name].high - found[name].low) / 2
            cells.append(f"{found[name].value:.2f} ± {margin:.2f} ({expected[name]:g})")
        stops = [line["stable_at"] for line in each if line["stable_at"]]
        cells.append(f"{len(stops)} of {len(each)}, step {min(stops)} to {max(stops)}" if stops else "-")
        rows.append([f"{c:g}", method, *cells])
    widths = sorted({line["width"] for line in lines})
    draw(groups, figure)
    text = f"Exponents γ in the width at step {last}, widths {widths[0]} to {widths[-1]}: measured ± 95 % over "
    text += f"{len({line['seed'] for line in lines})} seeds (theorem 3.1).\n\n"
    return text + tables.markdown(("c", "method", *NAMES, "stable"), rows) + f"\n\n![exponents]({figure.name})\n\n"


def draw(groups: dict[Any, list[dict[str, Any]]], path: Path) -> None:
    """Writes a figure: for each c the sizes over the width at the last step, and the slopes that theory predicts."""
    from matplotlib.figure import Figure

    exponents_of_rate = sorted({c for c, _ in groups})
    figure = Figure(figsize=(2.7 * len(NAMES), 2.6 * len(exponents_of_rate)), layout="constrained")
    axes = figure.subplots(len(exponents_of_rate), len(NAMES), squeeze=False, sharex=True)
    for (c, method), lines in groups.items():
        row, color = axes[exponents_of_rate.index(c)], f"C{list(METHODS).index(method)}"
        last, widths = list(lines[0]["sizes"])[-1], sorted({line["width"] for line in lines})
        sizes = np.array([[line["sizes"][last] for line in lines if line["width"] == width] for width in widths])
        for number, (name, ax) in enumerate(zip(NAMES, row, strict=True)):
            each = sizes[:, :, number]
            ax.plot(widths, each, color=color, linewidth=0.5, alpha=0.5)
            middle, slope = np.exp(np.log(each).mean(1)), predicted(c, method)[name]
            ax.plot(widths, middle, "o", markersize=3, color=color, label=method)
            ax.plot(widths, middle[0] * (np.array(widths) / widths[0]) ** slope, "--", color=color, linewidth=1)
            ax.set(xscale="log", yscale="log", title=f"{name}, c = {c:g}")
    axes[0, 0].legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("width n (dashed: predicted slope)", fontsize=8)
    figure.savefig(path, dpi=110)


def main(config: WidthConfig) -> None:
    if config.smoke:
        with tempfile.TemporaryDirectory() as folder:
            main(replace(config, smoke=False, widths=(16, 32), seeds=2, steps=4, results=Path(folder)))
        return
    file = config.results / "width_scaling.jsonl"
    made_by = provenance()
    done = {(line["c"], line["method"], line["width"], line["seed"]) for line in read_metrics(file)}
    for c, method, width in itertools.product(config.exponents, METHODS, config.widths):
        if not {(c, method, width, seed) for seed in range(config.seeds)} <= done:
            for line in measure(config, c, method, width):
                if (c, method, width, line["seed"]) not in done:
                    append(file, line | {"lam": config.lam, "steps": config.steps} | made_by)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(WidthConfig))
