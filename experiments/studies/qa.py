"""Question answering: five methods, each at its best of a small search, over several seeds (the paper's table 1).

Question:  on a fixed budget of steps, which method makes SmolLM2-135M choose more right answers, and is the difference
           more than chance? Learning rate η, scale s and λ are searched on 400 questions kept out of training; what is
           reported is trained on all training questions and scored on the validation split.
Command:   python -m experiments.studies.qa        (--tasks arc_easy openbookqa; --together 8 on an accelerator; --help)
Hardware:  2 CPU cores, 6 GB. Minutes: 1 to 7 per cell, mostly compilation; 36 + 25 to 30 cells per task, 3 to 6 hours.
Paper:     Stable-LoRA 0.5 to 2.1 points above AdamW, on larger models, longer runs, best of 3 seeds.
Observed:  65 +- 2 % per token on ARC-Easy for AdamW; results/qa.md.

LoRA with r = 8 on q and v, base in bfloat16, softmax over the choices, cosine after a warm-up of 3 %, gradients clipped
to norm 1, LoRA+ with B's rate 4 times A's. Guessing has 25 %. Stable-LoRA's search has twice the cells of the others'
for its one number more. What is best is so by accuracy, so nats compare those choices as much as the methods: AdamW is
also trained at Stable-LoRA's own η and s. 68 steps end before any matrix is stable: at λ = 0.005, A has lost 29 % by
then, and the stop rule has not acted. 9 of ARC-Easy's training questions and 45 of OpenBookQA's have the text of one in
validation or test, and a few of those held out have that of one trained on.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.running.cells import Cell, Options, Record, append, read_lines, run_cells, training
from experiments.running.provenance import provenance
from experiments.running.shared import questions, shared_questions
from experiments.running.smoke import smoke
from experiments.studies.qa_tables import report
from stable_lora_jax.evaluation import evaluate
from stable_lora_jax.finetune import load_with_adapter
from stable_lora_jax.training import METHODS

NUMBERS = ("learning_rate", "alpha", "lam")


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
    lams = config.lams if method == "stable-lora" else (None,)
    cells = []
    for rate, scale, lam in itertools.product(config.learning_rates, config.scales, lams):
        numbers = {"learning_rate": rate, "alpha": 8 * scale, "lam": lam, "seed": 100}
        train = training(config, task, method=method, holdout=config.holdout, **numbers)
        cells.append(Cell(train=train, score_on="holdout"))
    return cells


def best_numbers(searched: Sequence[Record]) -> dict[str, float]:
    """Returns the numbers that were best in a search (ties: the likelier answers).

    Raises:
      ValueError: every cell of the search failed.
    """
    if not (whole := [record for record in searched if "failed" not in record]):
        told = {record["failed"] for record in searched}
        raise ValueError(f"Every cell of the search failed ({'; '.join(sorted(told))}). Search smaller η and s.")
    best = max(whole, key=lambda record: (record["accuracy_token"], -record["nll_token"]))
    return {name: best["train"][name] for name in NUMBERS if name in best["train"]}


def searched_numbers(method: str, results: Path) -> dict[str, float]:
    """Returns the numbers that a method's search on ARC-Easy chose; none where nothing was searched."""

    def of_search(train: Record) -> bool:
        return train["method"] == method and Path(train["data"]).stem == "arc_easy"

    found = [line for line in read_lines("qa_search", results) if of_search(line["train"])]
    return best_numbers(found) if found else {}


def reported_cells(config: QaConfig, task: str, method: str, numbers: dict[str, float]) -> list[Cell]:
    return [
        Cell(train=training(config, task, method=method, seed=seed, **numbers), score_on=config.score_on)
        for seed in range(config.seeds)
    ]


def references(config: QaConfig, task: str) -> None:
    """Adds the lines of what needs no training, where they are missing: the base model and the longest answer."""
    file = config.results / "qa_references.jsonl"
    known = {"data": task, "score_on": config.score_on, "model": config.model, "dtype": config.dtype}
    if any(line.items() >= known.items() for line in read_lines("qa_references", config.results)):
        return
    data = training(config, task).data
    asked, examples = questions(data, config.score_on), shared_questions(config.model, data, config.score_on)
    base = evaluate(load_with_adapter(config.model, None, config.dtype), examples).summary()
    longest = [max(range(len(q.choices)), key=lambda i, q=q: len(q.choices[i])) == q.answer_index for q in asked]
    append(file, known | {"base": base, "longest_answer": sum(longest) / len(longest)} | provenance())


def main(config: QaConfig) -> None:
    if config.smoke:
        changes = {"learning_rates": (1e-2,), "scales": (2.0,), "lams": (0.1,), "holdout": 4, "seeds": 1}
        with smoke(config, **changes, methods=("adamw", "stable-lora")) as small:
            return main(small)
    for task in config.tasks:
        best: dict[str, dict[str, float]] = {}
        for method in config.methods:
            searched = run_cells("qa_search", search_cells(config, task, method), config)
            if len(searched) == len(search_cells(config, task, method)):  # other parts may still be searching
                best[method] = best_numbers(searched)
                run_cells("qa", reported_cells(config, task, method, best[method]), config)
        if config.part.startswith("1/"):
            references(config, task)
        if {"adamw", "stable-lora"} <= best.keys():
            numbers = {name: best["stable-lora"][name] for name in best["adamw"]}
            if numbers != best["adamw"]:
                run_cells("qa_controls", reported_cells(config, task, "adamw", numbers), config)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(QaConfig))
