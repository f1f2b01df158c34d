"""Overhead: what each method costs in time and memory beside AdamW (the paper's table of cost).

Question:  how much longer is a training step, and how much more does the optimizer keep, than with AdamW?
Command:   python -m experiments.overhead      (reads the lines of `make bench-optimizers` and of experiments.qa)
Hardware:  any; the times are those of the files. Minutes: 0.1.
Expected:  the paper, 0.5B on HellaSwag: Stable-LoRA +0.6 %, LoRA+ 0, Riemannian +8.3, LoRA-RITE +46; no extra memory.
           A flag a matrix is one byte: 60 bytes here, beside the 3.7 MB that AdamW keeps.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import tables
from experiments.bench_optimizers import SMOLLM2_135M
from experiments.cells import read_lines
from stable_lora_jax.training import METHODS, make_optimizer

PAPER = {"adamw": 0.0, "lora-plus": 0.0, "riemannian": 8.3, "lora-rite": 46.0, "stable-lora": 0.6}
BENCHED = {"adamw": "AdamW", "lora-plus": "LoRA+", "riemannian": "Riemannian", "lora-rite": "LoRA-RITE"}
BENCHED |= {"stable-lora": "Stable-LoRA"}


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Put together what the methods cost."""

    results: Path = Path("experiments/results")
    """Folder of the lines."""
    smoke: bool = False
    """As always: it takes seconds."""


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
    """Returns the table; what has not been measured is a dash."""
    file = results / "bench_optimizers.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    update = runs[-1]["smollm2_135m"] if runs else {}
    bench = (
        json.loads((results / "bench_train.json").read_text())["cells"]
        if (results / "bench_train.json").exists()
        else []
    )
    step = [1e3 * c["ours"]["median_seconds"] for c in bench if (c["dtype"], c["length"]) == ("bfloat16", 64)]
    trained = tables.grouped(
        (r for r in read_lines("qa", results) if "together" not in r and not r.get("resumed")),
        lambda r: r["train"]["method"],
    )
    seconds = {method: np.median([r["train_seconds"] for r in each]) for method, each in trained.items()}
    rows = []
    for method in METHODS:
        ms, base = (update.get(BENCHED[name]) for name in (method, "adamw"))
        measured = {"adamw", method} <= seconds.keys()
        run = f"{seconds[method]:.0f} ({seconds[method] / seconds['adamw'] - 1:+.1%})" if measured else "-"
        more = f"{(ms - base) / step[0]:+.2%}" if ms and step else "-"
        kilobytes = state_bytes(method) / 1e3
        rows.append([method, f"{ms:.2f}" if ms else "-", more, run, f"{kilobytes:,.1f}", f"{PAPER[method]:+.1f} %"])
    header = (
        "method",
        "update, ms",
        "of a training step",
        "seconds a run of experiments.qa",
        "state, kB",
        "paper, time",
    )
    return tables.markdown(header, rows) + "\n\n"


def main(config: OverheadConfig) -> None:
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(OverheadConfig))
