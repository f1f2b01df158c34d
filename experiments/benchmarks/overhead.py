"""Overhead: what each method costs in time and memory beside AdamW (the paper's table of cost).

Question:  how much longer is a training step, and how much more does the optimizer keep, than with AdamW?
Command:   python -m experiments.benchmarks.overhead      (reads what `make bench-optimizers` and `make bench` measured)
Hardware:  any; the times are those of the files: an update on one thread, and the shortest step, of 8 rows of 64 tokens
           with the base in bfloat16, on two cores with a newer jax. Longer steps have smaller shares. Minutes: 0.1.
Paper:     0.5B on HellaSwag: Stable-LoRA +0.6 %, LoRA+ 0, Riemannian +8.3, LoRA-RITE +46; no extra memory.
           A flag per matrix is one byte: 60 bytes here, beside the 3.7 MB that AdamW keeps.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks.bench_optimizers import PAPER, SMOLLM2_135M, share_of_step
from experiments.running.markdown import markdown
from stable_lora_jax.training import make_optimizer

# As the benchmark calls them -> as the library does.
METHODS = {
    "AdamW": "adamw",
    "Stable-LoRA": "stable-lora",
    "LoRA+": "lora-plus",
    "Riemannian": "riemannian",
    "LoRA-RITE": "lora-rite",
}


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Put together what the methods cost."""

    results: Path = Path("experiments/results")
    """Folder of the lines."""
    smoke: bool = False
    """Changes nothing: it takes seconds as it is."""


def state_bytes(method: str) -> int:
    """Returns the bytes of a method's optimizer state for SmolLM2-135M, r = 8 on q and v, from shapes alone."""
    pairs = {
        str(number): {
            "lora_a": jax.ShapeDtypeStruct((count, n, 8), jnp.float32),
            "lora_b": jax.ShapeDtypeStruct((count, 8, m), jnp.float32),
        }
        for number, (count, n, m) in enumerate(SMOLLM2_135M)
    }
    optimizer = make_optimizer(method, 1e-3, lam=0.001, ratio=4.0, weight_decay=0.0, clip_norm=1.0)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, pairs)))


def report(results: Path) -> str:
    """Returns the table; nothing where no times are."""
    file = results / "bench_optimizers.json"
    if not file.exists():
        return ""
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"]
    (update,) = (run["smollm2_135m"] for run in runs if run["threads"] == 1)
    rows = []
    for name, method in METHODS.items():
        times = f"{update[name]:.2f}", share_of_step(update, name)
        rows.append([name, *times, f"{state_bytes(method) / 1e3:,.1f}", PAPER[name]])
    header = ("method", "update, ms", "over AdamW, of a training step", "state, kB", "in the paper, time")
    return markdown(header, rows) + "\n\n"


def main(config: OverheadConfig) -> None:
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(OverheadConfig))
