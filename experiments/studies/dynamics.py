"""Dynamics: how ‖A‖, ‖B‖ and the terms of a step move, and when matrices become stable (the paper's figure 2).

Question:  with AdamW, does ‖A‖ stay at its start while ‖B‖ grows, and does δ₁ = s A ΔB dominate δ₂ = s ΔA B? What does
           the shrink change, and how does the number of steps until stable depend on λ, η, s, module and layer?
Command:   python -m experiments.studies.dynamics      (--help)
Hardware:  2 CPU cores, 6 GB. Minutes: 8 to 21 a cell, 7 cells.
Observed:  AdamW: ‖A‖ never below its start, δ₁ above δ₂ throughout. λ = 0.005, η = 5e-4, s = 2, one epoch: no q_proj of
           30 becomes stable, all v_proj do, around step 222 of 281.

δ₁ and δ₂ are norms of products of matrices, as white layer inputs would give them; the paper's Z are real inputs. ΔA is
all that A moves by, the shrink included, so with Stable-LoRA ‖ΔA B‖ falls no lower than λ ‖A B‖ while a pair shrinks,
also where η and with it the paper's δ₂ go to 0. One seed; the steps are medians over the matrices that stopped.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.running.cells import Cell, Options, Record, run_cells, score_questions, training
from experiments.running.smoke import smoke
from experiments.studies.dynamics_tables import FIELDS, report
from stable_lora_jax.training import RunDirectory

# (λ, η, s); λ = 0 is AdamW. One number changes at a time.
POINTS = tuple((lam, 5e-4, 2) for lam in (0, 0.001, 0.005, 0.02))
POINTS += ((0.005, 2e-4, 2), (0.005, 1e-3, 2), (0.005, 5e-4, 16))


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig(Options):
    """Record norms and terms every few steps, for several λ, η and s."""

    steps: int = 281
    """An epoch of ARC-Easy."""
    points: tuple[tuple[float, float, float], ...] = POINTS
    """(λ, η, s) of each run; λ = 0 is AdamW."""


def cells(config: DynamicsConfig) -> list[Cell]:
    found = []
    for task, (lam, rate, scale) in itertools.product(config.tasks, config.points):
        numbers = {"learning_rate": rate, "alpha": 8 * scale, "lam": lam, "loss": "answer"}
        numbers |= {"method": "stable-lora" if lam else "adamw", "norms_every": 5}
        found.append(Cell(train=training(config, task, **numbers), score_on=config.score_on))
    return found


def score(cell: Cell, directory: Path) -> Record:
    """Returns the usual scores, and the quartiles over the layers of every norm at every record."""
    lines = [line for line in RunDirectory(directory).metrics() if "norms" in line]
    series: dict[str, Any] = {"steps": [line["step"] for line in lines]}
    for pair in lines[0]["norms"]:
        series[pair] = {field: [_quartiles(line["norms"][pair].get(field)) for line in lines] for field in FIELDS}
    return score_questions(cell, directory) | {"series": series}


def _quartiles(values: list[float | None] | None) -> list[float] | None:
    """Returns the quartiles of what is finite, four digits; None where nothing is."""
    known = [value for value in values or [] if value is not None]
    return [float(f"{q:.4g}") for q in np.quantile(known, (0.25, 0.5, 0.75))] if known else None


def main(config: DynamicsConfig) -> None:
    if config.smoke:
        with smoke(config, points=((0.1, 1e-2, 2),)) as small:
            main(small)
        return
    if config.together > 1:
        raise ValueError("dynamics needs norms as a run goes on; runs trained together have none. Omit --together.")
    run_cells("dynamics", cells(config), config, score)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(DynamicsConfig))
