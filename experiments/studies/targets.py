"""Target modules: does what is adapted change what the shrink does (the paper's table of target modules)?

Question:  AdamW against Stable-LoRA with adapters on q and v, on all of attention, and on the feed-forward part too,
           each at the η, s and λ that its search on ARC-Easy chose with q and v adapted (experiments.studies.qa);
           and AdamW at half its η with all modules, as more modules may want a lower one.
Command:   python -m experiments.studies.targets    (--seeds 1; --dtype float32 on processors without bfloat16; --help)
Hardware:  2 CPU cores, 8 GB. Minutes: 2 to 9 per cell, 21 cells.
Expected:  (2026-11-29, 2026-11-30) in LOG.md.
Observed:  with all modules Stable-LoRA 6.5 points above AdamW (±7.6 over three seeds, +4.0 to +9.1 over questions) and
           1.32 nats per token better; above AdamW at half its rate, 1.3 points and 0.33 nats.
Paper:     3B, its five sets merged: qv 84.13 (AdamW 83.79), qkvo 84.93 (84.54), qkvogud 85.60 (85.31). Here
           each set stands alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

from experiments.running import tables
from experiments.running.cells import Cell, Options, Record, read_lines, run_cells, training
from experiments.running.markdown import markdown
from experiments.running.smoke import smoke
from experiments.studies.qa import searched_numbers

HALVED = "adamw, half its rate"


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Options):
    """Train AdamW and Stable-LoRA with adapters on more and more modules."""

    targets: tuple[str, ...] = ("qv", "qkvo", "qkvogud")
    """Modules to adapt."""
    seeds: int = 3
    """Seeds 0, 1, ..."""
    halved: tuple[str, ...] = ("qkvogud",)
    """Modules with which AdamW is trained at half its rate too: that one was searched with q and v alone."""


def cells(config: TargetsConfig) -> list[Cell]:
    """Returns the runs, seed by seed, so that a run that is cut has whole tables of the first seed."""
    found, numbers = [], {method: searched_numbers(method, config.results) for method in config.methods}
    for task, seed, targets, method in product(config.tasks, range(config.seeds), config.targets, config.methods):
        train = training(config, task, method=method, targets=targets, seed=seed, **numbers[method])
        found.append(Cell(train=train, score_on=config.score_on))
    searched = searched_numbers("adamw", config.results)
    slower = searched | {"learning_rate": _half(searched)}
    for task, seed, targets in product(config.tasks, range(config.seeds), config.halved if searched else ()):
        train = training(config, task, method="adamw", targets=targets, seed=seed, **slower)
        found.append(Cell(train=train, score_on=config.score_on))
    return found


def report(results: Path) -> str:
    """Returns the tables, one per task and setting."""
    records, text = read_lines("targets", results), ""
    varied = (*tables.OF_METHODS, "targets", "learning_rate", "alpha")
    for each in tables.grouped(records, lambda record: tables.setting(record, *varied)).values():
        groups = by_modules(each, results)
        rows = [[*key, *row] for key, row in tables.scored(groups, lambda key: (key[0], "adamw")).items()]
        text += f"**{tables.task_of(each[0])}**, {each[0]['steps']} steps of {each[0]['train']['batch_size']}\n\n"
        text += f"{markdown(('targets', 'method', *tables.SCORES), rows)}\n\n{tables.made_by(groups)}"
    return text + tables.failures(records) + (tables.LEGEND if text else "")


def _half(searched: Mapping[str, float]) -> float:
    """Returns half the rate that a search chose, not a number where nothing was searched."""
    return searched.get("learning_rate", math.nan) / 2


def by_modules(records: Sequence[Record], results: Path) -> dict[tuple[str, str], list[Record]]:
    """Returns (modules, method) -> lines of its seeds, AdamW at half its rate as a method of its own."""
    half = _half(searched_numbers("adamw", results))

    def key(record: Record) -> tuple[str, str]:
        train = record["train"]
        is_halved = (train["method"], train["learning_rate"]) == ("adamw", half)
        return train["targets"], HALVED if is_halved else train["method"]

    return tables.grouped(records, key)


def main(config: TargetsConfig) -> None:
    if config.smoke:
        with smoke(config, targets=("qkvogud",), seeds=1) as small:
            main(small)
        return
    run_cells("targets", cells(config), config)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(TargetsConfig))
