"""Width scaling: the exponents of the paper's theory (section 3, theorem 3.1), measured, beside its prediction.

Question:  v = Θ(n^γ): with which γ do A_t Z, B_t, δ₁, δ₂, δ₃ and ΔY grow with the width n, for AdamW and Stable-LoRA?
Command:   python -m experiments.studies.width_scaling       (--help)
Hardware:  2 CPU cores, 2 GB. Minutes: 1.
Observed:  the predictions within 0.15, a factor of 1.9 over all widths and a tolerance of ours, in all rows but one;
           most intervals exclude them. At c = 3/2, δ₁ and ΔY explode with γ = 1/2 under AdamW, not once Stable-LoRA has
           erased A₀. The row that disagrees: Stable-LoRA, c = 3/2, b2 = 0.999: all vanish faster, ΔY with γ = -0.6.

A teacher adds x U V (rank 4, outputs of order 1) to a frozen layer n -> n, a student s x A B; the layer itself cancels
in their difference and is left out. The batch is fixed, the loss a sum over outputs, Adam's eps so small that it plays
no role at any width. Measured: root mean squares over entries, on the training inputs. Constants were chosen on other
teachers, inputs and starts.
"""

import itertools
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import Array

from experiments.studies import theory
from experiments.studies.theory import METHODS, RANK, by_step, constants, measure_missing, section, sizes_of_step
from stable_lora_jax import stability, stable_lora_shrink
from stable_lora_jax.lora.layer import A_INIT
from stable_lora_jax.training import read_metrics

BATCH = 16


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
    """Returns a line per seed."""
    numbers = map(jnp.float32, (*constants(c, width, config.steps), config.lam, METHODS[method]))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), width), config.seeds)
    sizes, stable = jax.device_get(students(width, config.steps, *numbers, keys, shrink=method != "adamw"))
    lines = []
    for seed in range(config.seeds):
        when = int(stable[seed].argmax()) + 1 if stable[seed].any() else 0
        line = {"c": c, "method": method, "width": width, "seed": seed, "stable_at": when}
        lines.append(line | {"sizes": by_step(sizes[seed]), "lam": config.lam, "steps": config.steps})
    return lines


def report(results: Path) -> str:
    """Returns the table of exponents at the last step and what is behind it, and draws the figure beside the lines."""
    lines = read_metrics(results / "width_scaling.jsonl")
    return section(lines, results / "width_scaling.png") + f"```\n{theory.__doc__}```\n" if lines else ""


def main(config: WidthConfig) -> None:
    if config.smoke:
        with tempfile.TemporaryDirectory() as folder:
            main(replace(config, smoke=False, widths=(16, 32), seeds=2, steps=4, results=Path(folder)))
        return
    file, points = config.results / "width_scaling.jsonl", itertools.product(config.exponents, METHODS, config.widths)
    wanted = [(point, [(*point, seed) for seed in range(config.seeds)]) for point in points]
    same = {"lam": config.lam, "steps": config.steps}
    measure_missing(file, ("c", "method", "width", "seed"), wanted, lambda point: measure(config, *point), same)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(WidthConfig))
