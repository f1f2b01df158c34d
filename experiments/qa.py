"""Question answering: five methods, each at its best of a small search, over several seeds (the paper's table 1).

Question:  on a fixed budget of steps, which method makes SmolLM2-135M choose more right answers, and is the difference
           more than chance? Learning rate η, scale s and λ are searched on 400 questions kept out of training; what is
           reported is trained on all training questions and scored on the validation split. (9 of ARC-Easy's training
           questions and 45 of OpenBookQA's have the text of one in validation or test, for all methods alike.)
Command:   python -m experiments.qa        (--tasks arc_easy openbookqa; --together 8 on an accelerator; --help)
Hardware:  2 CPU cores, 6 GB. Minutes: about 3 a cell; 36 + 25 cells a task, so about 3 hours a task.
Expected:  65 +- 2 % per token on ARC-Easy for AdamW. The paper finds Stable-LoRA 0.6 to 2.1 points above AdamW, on
           larger models, longer runs, best of 3 seeds.

Stable-LoRA's search has twice the cells of the others', because it has one number more. 68 steps end before any matrix
is stable: at λ = 0.005, A has lost 29 % by then, and the stop rule has not acted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import tables
from experiments.cells import Cell, Options, Record, read_lines, run_cells, training
from experiments.smoke import smoke
from stable_lora_jax.training import METHODS

NUMBERS = ("learning_rate", "alpha", "lam")
CHANCE = """\
No interval covers the search, one seed on few questions (400 have a standard error of 2.3 points): what it chose is
partly chance.
"""


@dataclass(frozen=True, kw_only=True)
class QaConfig(Options):
    """Search each method's numbers on held-out training questions, then train it with several seeds and report."""

    methods: tuple[str, ...] = METHODS
    """The methods to compare."""
    seeds: int = 5
    """Seeds of the reported runs: 0, 1, ...; the search has a seed of its own."""
    holdout: int = 400
    """Training questions that the search is scored on, and not trained on."""
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    """η of the search."""
    scales: tuple[float, ...] = (2.0, 16.0)
    """s of the search."""
    lams: tuple[float, ...] = (0.001, 0.005)
    """λ of the search, for stable-lora."""


def search_cells(config: QaConfig, task: str, method: str) -> list[Cell]:
    lams = config.lams if method == "stable-lora" else (0.0,)
    cells = []
    for rate, scale, lam in itertools.product(config.learning_rates, config.scales, lams):
        numbers = {"learning_rate": rate, "alpha": 8 * scale, "lam": lam, "seed": 100}
        train = training(config, task, method=method, holdout=config.holdout, **numbers)
        cells.append(Cell(train=train, score_on="holdout"))
    return cells


def reported_cells(config: QaConfig, task: str, method: str, searched: Sequence[Record]) -> list[Cell]:
    """Returns the cells of all seeds, with the numbers that were best in the search (ties: the likelier answers)."""
    whole = [record for record in searched if "failed" not in record]
    best = max(whole, key=lambda record: (record["accuracy_token"], -record["nll_token"]))
    numbers = {name: best["train"][name] for name in NUMBERS}
    seeds = range(config.seeds)
    return [
        Cell(train=training(config, task, method=method, seed=seed, **numbers), score_on=config.score_on)
        for seed in seeds
    ]


def report(results: Path) -> str:
    """Returns the tables, one a task and setting."""
    varied = ("method", *NUMBERS)
    records = read_lines("qa", results)
    # A search differs from what it is made for in the questions that it leaves out and is scored on.
    searches = tables.grouped(read_lines("qa_search", results), lambda r: (_searched(r, *varied), r["train"]["method"]))
    text = ""
    for of_task in tables.grouped(records, lambda record: tables.setting(record, *varied)).values():
        methods = tables.grouped(of_task, lambda record: record["train"]["method"])
        scores, rows = tables.scored(methods, lambda method: "adamw"), []
        for method, each in methods.items():
            train, search = each[0]["train"], searches.get((_searched(each[0], *varied), method), [])
            found = sorted((100 * record["accuracy_token"] for record in search), reverse=True)
            numbers = f"{train['learning_rate']:g}, {train['alpha'] / train['rank']:g}, {train['lam'] or '-'}"
            told = f"{found[0]:.1f}, {found[1]:.1f} … {found[-1]:.1f} of {len(found)}" if len(found) > 1 else "-"
            rows.append([method, numbers, told, *scores[method]])
        one = of_task[0]
        text += f"**{tables.task_of(one)}**, {one['questions']} questions ({Path(one['score_on']).name}), "
        text += f"{one['steps']} steps of {one['train']['batch_size']}, {Path(one['train']['model']).name}\n\n"
        text += f"{tables.markdown(('method', 'η, s, λ', 'in the search, %', *tables.SCORES), rows)}\n\n"
    return text + tables.failures(records) + (f"{tables.LEGEND}{CHANCE}" if text else "")


def _searched(record: Record, *varied: str) -> str:
    return tables.setting(record, *varied, "holdout", "score_on")


def main(config: QaConfig) -> None:
    if config.smoke:
        changes = {"learning_rates": (1e-2,), "scales": (2.0,), "lams": (0.1,), "holdout": 4, "seeds": 1}
        with smoke(config, **changes) as small:
            main(small)
        return
    for task, method in itertools.product(config.tasks, config.methods):
        searched = run_cells("qa_search", search_cells(config, task, method), config)
        if len(searched) == len(search_cells(config, task, method)):  # other parts may still be searching
            run_cells("qa", reported_cells(config, task, method, searched), config)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(QaConfig))
