"""One visit to a GPU: all five question sets, target modules, lengths and rates, as many runs per program as fit.

Question:  on all five question sets, over a whole pass of 281 steps and with five seeds, how do five methods compare,
           each at the η, s and λ that its search on ARC-Easy chose; what do more target modules and longer training
           change; and what do the rates say at s = 2 and 16?
Command:   python -m experiments.gpu_day --minutes 9       (run again, it does what is missing)
Hardware:  one H100 and the packaged model and questions in the cache folder. Minutes: 9 a visit.
Expected:  (2026-11-27) on no set is Stable-LoRA more than 2 points from AdamW; LoRA+ is above both where 281 steps are
           too few, as on OpenBookQA with 68. 125 runs of the first part take 4 minutes.

The order is that of what is missed most. Every program trains the seeds of one method on one set, or a column of rates;
its lines are written before the next begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from experiments.running import tables
from experiments.running.cells import Cell, Options, read_lines, run_cells, training
from experiments.running.markdown import markdown
from experiments.running.smoke import smoke
from experiments.studies import ablation, rates, targets
from experiments.studies.pilot import EARLY
from experiments.studies.qa import searched_numbers
from stable_lora_jax.assets import cache_dir
from stable_lora_jax.data import TASKS
from stable_lora_jax.training import METHODS, compilation_cache


@dataclass(frozen=True, kw_only=True)
class GpuDayConfig(Options):
    """Do as much as a visit to a GPU allows, many runs per program."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Question sets."""
    methods: tuple[str, ...] = METHODS
    """The methods to compare."""
    steps: int | None = 281
    """Steps of a run: one pass over ARC-Easy."""
    together: int = 60
    """Runs per program, at most."""
    minutes: float | None = 9.0
    """No program begins after that."""
    seeds: int = 5
    """Seeds 0, 1, ... of the question sets."""
    lengths: tuple[int, ...] = (1, 3, 10)
    """Lengths of training, in passes over ARC-Easy."""


def cells(config: GpuDayConfig) -> list[Cell]:
    """Returns the runs on all question sets, each method with the numbers that its search chose."""
    found = []
    for task in config.tasks:
        for method in config.methods:
            numbers = searched_numbers(method, config.results)
            for seed in range(config.seeds):
                train = training(config, task, method=method, seed=seed, **numbers)
                found.append(Cell(train=train, score_on=config.score_on))
    return found


def report(results: Path) -> str:
    """Returns a table for each question set."""
    records, text = read_lines("gpu_day", results), ""
    varied = (*tables.OF_METHODS, "learning_rate", "alpha")
    for each in tables.grouped(records, lambda record: tables.setting(record, *varied)).values():
        groups = tables.grouped(each, lambda record: record["train"]["method"])
        rows = [[name, *row] for name, row in tables.scored(groups, lambda _: "adamw").items()]
        text += f"**{tables.task_of(each[0])}**, {each[0]['steps']} steps of {each[0]['train']['batch_size']}\n\n"
        text += f"{markdown(('method', *tables.SCORES), rows)}\n\n{tables.made_by(groups)}"
    return text + tables.failures(records) + (tables.LEGEND if text else "")


def visit(config: GpuDayConfig, small: Mapping[str, dict[str, Any]]) -> None:
    """Runs what is missing of the question sets, of target modules, of lengths and of rates.

    Args:
      config: the options; the studies after the first get what all of them have, and the first task.
      small: study -> what else is smaller in a smoke test.
    """
    run_cells("gpu_day", cells(config), config)
    names = {each.name for each in fields(Options)} - {"methods", "steps"}
    shared: dict[str, Any] = {name: getattr(config, name) for name in names} | {"tasks": config.tasks[:1]}
    of_targets: dict[str, Any] = {"steps": config.steps, "seeds": config.seeds}
    of_lengths: dict[str, Any] = {"steps": config.steps, "lengths": config.lengths}
    of_rates: dict[str, Any] = {"together": 1 + config.together // 2}
    modules = targets.TargetsConfig(**shared | of_targets | small.get("targets", {}))
    run_cells("targets", targets.cells(modules), modules)
    lengths = ablation.AblationConfig(**shared | of_lengths | small.get("lengths", {}))
    run_cells("ablation", ablation.cells(lengths), lengths)
    rates.main(rates.RatesConfig(**shared | of_rates | small.get("rates", {})))


def main(config: GpuDayConfig) -> None:
    if config.smoke:
        few = {"methods": ("adamw", "stable-lora"), "seeds": 2, "lengths": (1,)}
        with smoke(config, together=2, minutes=None, **few) as tiny:
            of_lengths = {"lams": (0.05,), "controls": (), "seeds": 1}  # each alone, so with checkpoints to resume from
            grid = {"variants": ("AdamW", "A₀ × 1/4", EARLY), "rates": (1e-3, 2e-3), "scales": (2.0, 16.0), "seeds": 1}
            of_rates = grid | {"settings": ("few",), "held_out": 4, "steps": tiny.steps}
            visit(tiny, {"targets": {"targets": ("qkvogud",)}, "lengths": of_lengths, "rates": of_rates})
            print(report(tiny.results))
        return
    with compilation_cache(cache_dir() / "compiled"):
        visit(config, {})
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(GpuDayConfig))
