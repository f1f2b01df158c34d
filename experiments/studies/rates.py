"""Rates: the shrink, a smaller start and decay over a grid of learning rates, at two scales, on two cores or on a GPU.

Question:  at each method's best learning rate, and over the whole grid, what does the shrink buy against AdamW,
           A₀ × 1/4 and decay on A, with few data and many passes, three passes, and fresh data, at s = 16 and at s = 2?
           Repeats the pilot (experiments.studies.pilot), with rates chosen on held-out questions.
Command:   python -m experiments.studies.rates    (--settings few --scales 16 --seeds 1; --part, --ray, --together)
Hardware:  2 CPU cores, 6 GB. Minutes: 6 to 30 per cell; a setting and scale has 78 per seed, 8 hours or
           more. One H100 with --together 60: by the pilot's 60 per minute 30 for all 1768, and their scoring.
Expected:  (2026-11-27, 2026-11-29, 2026-11-30) in LOG.md.
Observed:  few data and, of three ways with one seed at s = 16, fresh data. 24 cells of few repeat the pilot:
           AdamW's nats within 0.021, differences from it at the same rate within 0.027. AdamW's best rate is half the
           pilot's lowest: each at its best, of four seeds, λ = 0.0005 is level with it, A₀ × 1/4 and AdamW stopped
           early are 0.012 better, λ = 0.002 is 0.037 worse. At every rate λ = 0.002 is 0.036 to 0.066 worse
           than AdamW at half that rate. At s = 2, one seed in bfloat16, AdamW's nats are those of s = 16 at a quarter
           of the rate, within 0.010 but at the highest (0.044); λ = 0.002 is level with AdamW there, A₀ × 1/4 0.013
           better. λ up to 0.005 shrinks most of A until the end at its best rates (144 of 720 matrices of few become
           stable, s = 16, all with λ = 0.005); with λ = 0.02 all do by step 240, and it is level with AdamW, 0.004 ±
           0.004 better (three seeds, bfloat16). In that grid, of four seeds, a quarter of B's rate is 0.009 better,
           decay on A level, λ = 0.005 0.031 worse; of one seed LoRA+ and LoRA-RITE are level, and Riemannian is 0.013
           worse, as held-out questions chose twice AdamW's rate for it.
           With fresh data all best rates are 0.001, the end of the pilot's grid; there λ = 0.005 is 0.009 better,
           A₀ × 1/4 level.

LoRA r = 8 on q and v, 8 questions per step, cosine after 3 % warm-up, clip 1, loss on the right answer. Stopped
early: of ten validations, the adapter with the least held-out nats. Decay is per step at the peak rate: a weight decay
of d / η, so that A loses the share d there at every η of the grid, and less where the schedule has fallen.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.running.cells import Cell, Options, Record, bits, run_cells, training
from experiments.running.shared import right_answers, scored, trained_model
from experiments.running.smoke import smoke
from experiments.studies.pilot import EARLY
from experiments.studies.rates_tables import report
from stable_lora_jax.data import Encoded, encode_all, hold_out, load_jsonl, load_task, load_tokenizer
from stable_lora_jax.training import RunDirectory

# setting -> (task, questions trained on or None for all, steps)
SETTINGS: Mapping[str, tuple[str, int | None, int]] = {
    "few": ("arc_easy", 500, 500),
    "passes": ("arc_easy", None, 750),
    "fresh": ("social_iqa", 4000, 500),
}
VALIDATIONS = 10  # of a run whose best adapter is kept
# η at s = 16, around the best ones of the pilot, whose grid ended at the best of few and of fresh; at s = 2 four times
# as much, since B has to become larger there.
RATES: Mapping[str, tuple[float, ...]] = {
    "few": (1.5625e-5, 3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4),
    "passes": (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3),
    "fresh": (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
}
# method as tables call it -> options, and decay per step at the peak rate
METHODS: Mapping[str, tuple[dict[str, Any], float]] = {
    "AdamW": ({"method": "adamw"}, 0.0),
    "λ = 0.0005": ({"method": "stable-lora", "lam": 0.0005}, 0.0),
    "λ = 0.002": ({"method": "stable-lora", "lam": 0.002}, 0.0),
    "λ = 0.005": ({"method": "stable-lora", "lam": 0.005}, 0.0),
    "λ = 0.02": ({"method": "stable-lora", "lam": 0.02}, 0.0),
    "A₀ × 1/4": ({"method": "adamw", "a_scale": 0.25}, 0.0),
    "decay on A, 0.002 per step": ({"method": "adamw", "decay_only_a": True}, 0.002),
    "decay on A and B, 0.001 per step": ({"method": "adamw"}, 0.001),
    "rate of B × 1/4": ({"method": "lora-plus", "ratio": 0.25}, 0.0),
    "lora-plus": ({"method": "lora-plus"}, 0.0),
    "riemannian": ({"method": "riemannian"}, 0.0),
    "lora-rite": ({"method": "lora-rite"}, 0.0),
    EARLY: ({"method": "adamw", "keep_best": True}, 0.0),
}


@dataclass(frozen=True, kw_only=True)
class RatesConfig(Options):
    """Train every method at every rate, setting, scale and seed, and report curves over the rates."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """few (500 questions, 8 passes), passes (three of ARC-Easy), fresh (4000 questions of Social IQA once)."""
    variants: tuple[str, ...] = tuple(METHODS)
    """Methods, as the tables call them."""
    scales: tuple[float, ...] = (16.0, 2.0)
    """s."""
    rates: tuple[float, ...] | None = None
    """η; those of the setting and scale if not given."""
    seeds: int = 4
    """Seeds 0, 1, ..."""
    held_out: int = 321
    """Training questions that the rate is chosen on; reported are ARC-Easy's test and Social IQA's validation split."""
    steps: int | None = None
    """Steps of a run; those of its setting if not given."""


def questions_of(task: str, split: str) -> list[Any]:
    """Returns the questions of a task's split, or those of a file."""
    return list(load_jsonl(task)) if task.endswith(".jsonl") else load_task(task, split)


def training_questions(task: str) -> list[Any]:
    """Returns the training questions whose choices differ, as those of a file must: of Social IQA all but 33."""

    def differ(choices: Sequence[str]) -> bool:
        return len({choice.strip() for choice in choices}) == len(choices)

    return [question for question in questions_of(task, "train") if differ(question.choices)]


@functools.cache
def training_files(setting: str, task: str, held_out: int, folder: Path) -> tuple[str, str]:
    """Returns .jsonl files of a setting's training questions and of those held out, named by their content."""
    items, chosen_on = hold_out(training_questions(task), held_out)
    count = SETTINGS[setting][1]
    items = items if count is None or count >= len(items) else hold_out(items, count)[1]
    return written(items, setting, folder), written(chosen_on, f"{setting}-held-out", folder)


def written(items: Sequence[Any], name: str, folder: Path) -> str:
    """Returns a .jsonl file of questions, named by its content."""
    names = ("question", "choices", "answer_index")
    text = "".join(json.dumps({name: getattr(q, name) for name in names}, ensure_ascii=False) + "\n" for q in items)
    file = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def rates_of(setting: str, scale: float) -> tuple[float, ...]:
    """Returns the grid of η at a scale."""
    return tuple((4 if scale < 8 else 1) * rate for rate in RATES[setting])


def cells(config: RatesConfig) -> list[Cell]:
    """Returns the runs, seed by seed, so that a run that is cut has whole curves of the first seed."""
    found = []
    order = itertools.product(config.settings, config.scales, range(config.seeds), config.variants)
    grid = [(*each, rate) for each in order for rate in config.rates or rates_of(*each[:2])]
    for setting, scale, seed, name, rate in grid:
        task = config.tasks[0] if config.tasks[0].endswith(".jsonl") else SETTINGS[setting][0]
        file, held_out = training_files(setting, task, config.held_out, config.runs.parent / "data")
        options, decay = METHODS[name]
        numbers = {
            "learning_rate": rate,
            "alpha": 8 * scale,
            "seed": seed,
            "loss": "answer",
            "weight_decay": decay / rate,
        }
        steps = config.steps or SETTINGS[setting][2]
        numbers |= options | {"steps": steps}
        if name == EARLY:
            numbers |= {"validation": held_out, "eval_every": max(1, steps // VALIDATIONS)}
        split = "validation" if task == "social_iqa" else "test"
        train, scoring = training(config, file, **numbers), f"held_out={config.held_out}"
        found.append(Cell(train=train, score_on=f"{task} {split}", scoring=scoring))
    return found


@functools.lru_cache(maxsize=1)
def scored_questions(model: str, task: str, split: str, held_out: int) -> tuple[list[Encoded], list[Encoded]]:
    """Returns the questions that rates are chosen on, and those that are reported, as token numbers."""
    tokenizer, (_, chosen_on) = load_tokenizer(model), hold_out(training_questions(task), held_out)
    return encode_all(tokenizer, chosen_on), encode_all(tokenizer, questions_of(task, split))


def score(cell: Cell, directory: Path, config: RatesConfig) -> Record:
    """Returns each reported question's log p and tokens of the right answer, and the nats of the held-out ones.

    Of a run that may be stopped early, also those of its validations, by step.
    """
    model, (task, split) = trained_model(cell.train.model, directory), cell.score_on.split()
    asked = scored_questions(cell.train.model.name, task, split, config.held_out)
    chosen, found = (scored(model, each) for each in asked)
    log_p, tokens = right_answers(found)
    summary = {name: round(value, 6) for name, value in found.summary().items()}
    summary |= {"held_out_nll": round(chosen.nll_token, 6), "correct_token": bits(found.correct_token)}
    lines = RunDirectory(directory).metrics()
    curve = [(line["step"], round(line["validation"]["loss"], 4)) for line in lines if "validation" in line]
    summary |= {"held_out_curve": curve} if curve else {}
    return summary | {"log_p": np.round(log_p, 3).tolist(), "tokens": tokens.tolist()}


def main(config: RatesConfig) -> None:
    if config.smoke:
        few = {"variants": ("AdamW", "λ = 0.005", EARLY), "rates": (1e-3, 2e-3), "scales": (2.0,), "seeds": 2}
        with smoke(config, settings=("few",), held_out=4, **few) as small:
            return main(small)
    run_cells("rates", cells(config), config, partial(score, config=config))
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(RatesConfig))
