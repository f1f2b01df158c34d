"""Target modules: does what is adapted change what the shrink does (the paper's table of target modules)?

Question:  AdamW against Stable-LoRA with adapters on q and v, on all of attention, and on the feed-forward part too.
Command:   python -m experiments.targets       (--help)
Hardware:  2 CPU cores, 8 GB. Minutes: 3 to 5 a cell; 3 x 2 x 3 cells, about 75.
Expected:  the paper, 3B, merged QA: qv 84.13 (AdamW 83.79), qkvo 84.93 (84.54), qkvogud 85.60 (85.31). Here, at a
           hundredth of its training, no difference beyond chance.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import tables
from experiments.cells import Cell, Options, read_lines, run_cells, training
from experiments.smoke import smoke


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Options):
    """Train AdamW and Stable-LoRA with adapters on more and more modules."""

    targets: tuple[str, ...] = ("qv", "qkvo", "qkvogud")
    """Modules to adapt."""
    learning_rate: float = 5e-4
    """η."""
    scale: float = 2.0
    """s."""
    lam: float = 0.001
    """λ of Stable-LoRA."""
    seeds: int = 3
    """Seeds 0, 1, ..."""


def cells(config: TargetsConfig) -> list[Cell]:
    numbers = {"learning_rate": config.learning_rate, "alpha": 8 * config.scale, "lam": config.lam}
    return [
        Cell(
            train=training(config, task, method=method, targets=targets, seed=seed, **numbers), score_on=config.score_on
        )
        for task in config.tasks
        for targets in config.targets
        for method in config.methods
        for seed in range(config.seeds)
    ]


def report(results: Path) -> str:
    """Returns the table."""
    records = read_lines("targets", results)
    header = ("task", "targets", "method", "seeds", "accuracy, %", "best of 3", "nats a token")
    header += (*tables.COMPARED, "stable")
    groups = tables.grouped(records, lambda r: (tables.task_of(r), r["train"]["targets"], r["train"]["method"]))
    rows = [
        [
            *key,
            len(tables.by_seed(each)),
            tables.percent(tables.of_seeds(each, "accuracy_token")),
            tables.best_of_three(each),
            tables.number(tables.of_seeds(each, "nll_token"), 3),
            *tables.compared(each, groups.get((*key[:2], "adamw"), each)),
            tables.stable_share(each),
        ]
        for key, each in groups.items()
    ]
    return (f"{tables.markdown(header, rows)}\n\n" if rows else "") + tables.failures(records)


def main(config: TargetsConfig) -> None:
    if config.smoke:
        with smoke(config, targets=("qkvogud",), seeds=1, lam=0.1) as small:
            main(small)
        return
    run_cells("targets", cells(config), config)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(TargetsConfig))
