"""Ablation: what of Stable-LoRA matters, and what else would do (the paper's table "without stability condition").

Question:  does it matter that the shrink stops; which λ; does AdamW with weight decay on A alone, large enough to
           remove the same share per step (η w = λ at the peak), do the same; does λ from a schedule; how does all that
           depend on the length of training?
Command:   python -m experiments.studies.ablation
           python -m experiments.studies.ablation --scale 2 --lams 0.02 --controls 0.02 (where pairs stop early)
           python -m experiments.studies.ablation --lengths 1 3 10  (AdamW and λ = 0.001 for longer too; --help)
Hardware:  2 CPU cores, 6 GB. Minutes: 4 to 20 a cell of one epoch; 11 variants x 3 seeds, about 4 hours; 37 to 47 a
           cell of three epochs, 73 to 94 of ten.
Paper:     at most 0.14 points between stopping and shrinking on, at λ <= 0.005.
Observed:  AdamW has 67 +- 2 % per token, and what stops is within a point of it; at λ = 0.02 what never stops is 11
           points below.

Whether stopping matters can show only where pairs stop: at s = 16 and λ = 0.001 none does within an epoch, so that run
and the one that never stops are the same; at λ = 0.005 some do in its last steps. At s = 2 and λ = 0.02 all do within
its first half; there, the cosine and the weight decay have not been run. Weight decay falls with the learning rate, so
its control is λ with a cosine to 0, not a constant λ. Ten epochs have one seed.
"""

import json
from dataclasses import dataclass
from typing import Any

import tyro

from experiments.running.cells import Cell, Options, run_cells, training
from experiments.running.smoke import smoke
from experiments.studies.ablation_tables import LONGEST, report
from stable_lora_jax.finetune import fingerprint, options_of
from stable_lora_jax.training import RunDirectory, read_metrics

SHOWN = ("norm_a", "norm_b", "gap")


@dataclass(frozen=True, kw_only=True)
class AblationConfig(Options):
    """Train variants of Stable-LoRA and controls from the same starts and on the same batches."""

    steps: int = 281
    """Steps of the length 1: an epoch of ARC-Easy."""
    lengths: tuple[int, ...] = (1,)
    """Lengths of training, in that many steps; beyond the first only AdamW and Stable-LoRA."""
    learning_rate: float = 5e-4
    """η."""
    scale: float = 16.0
    """s."""
    lams: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.005)
    """λ of Stable-LoRA with its stop rule."""
    controls: tuple[float, ...] = (0.001, 0.005)
    """λ of the other variants."""
    seeds: int = 3
    """Seeds 0, 1, ..."""


def variants(config: AblationConfig, length: int) -> list[dict[str, Any]]:
    """Returns what each variant changes."""
    found: list[dict[str, Any]] = [{"method": "adamw"}]
    stable = {"method": "stable-lora"}
    first = length == config.lengths[0]
    found += [stable | {"lam": lam} for lam in (config.lams if first else config.controls[:1])]
    for lam in config.controls if first else ():
        found.append(stable | {"lam": lam, "stop_when_stable": False})
        found.append(stable | {"lam": lam, "lam_schedule": "cosine"})
        found.append({"method": "adamw", "weight_decay": lam / config.learning_rate, "decay_only_a": True})
    return [each for each in found if each["method"] in config.methods]


def cells(config: AblationConfig) -> list[Cell]:
    numbers = {"learning_rate": config.learning_rate, "alpha": 8 * config.scale, "loss": "answer"}
    return [
        Cell(
            train=training(config, task, **numbers | each, steps=length * config.steps, seed=seed),
            score_on=config.score_on,
        )
        for task in config.tasks
        for length in config.lengths
        for each in variants(config, length)
        for seed in range(config.seeds)
    ]


def keep_norms(config: AblationConfig) -> None:
    """Keeps what a figure shows of the longest run of Stable-LoRA: its stops, and its norms at some 60 steps."""
    plain = {"method": "stable-lora", "lam_schedule": "constant", "stop_when_stable": True, "seed": 0}
    found = [cell for cell in cells(config) if options_of(fingerprint(cell.train)).items() >= plain.items()]
    longest = max(found, key=lambda cell: cell.train.schedule.steps or 0, default=None)
    if longest and (metrics := RunDirectory(config.runs / "ablation" / longest.key).metrics_file).exists():
        file, lines = RunDirectory(config.results / LONGEST).metrics_file, read_metrics(metrics)
        if max((line["step"] for line in read_metrics(file)), default=0) > lines[-1]["step"]:
            return  # what is kept is of a longer run
        norms = [line for line in lines if "norms" in line]
        kept: list[dict[str, Any]] = [line for line in lines if "pair" in line]
        for line in norms[:: max(1, len(norms) // 60)]:
            shown = {pair: {name: each[name] for name in SHOWN} for pair, each in line["norms"].items()}
            kept.append({"step": line["step"], "norms": shown})
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))


def main(config: AblationConfig) -> None:
    if config.smoke:
        with smoke(config, methods=config.methods, lams=(0.05,), controls=(0.05,), seeds=1) as small:
            main(small)
        return
    run_cells("ablation", cells(config), config)
    keep_norms(config)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(AblationConfig))
