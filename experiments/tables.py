"""How the lines of cells become rows of tables: groups, numbers with their intervals, comparisons."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import Record, correctness
from stable_lora_jax.evaluation import Estimate, expected_best, mean_interval, paired_bootstrap, sign_test

# What `compared` returns.
COMPARED = ("minus AdamW, seeds", "minus AdamW, questions", "sign test p")


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Returns key -> records, in the order in which the keys come; failed cells are left out (see `failures`)."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        if "failed" not in record:
            groups.setdefault(key(record), []).append(record)
    return groups


def failures(records: Sequence[Record]) -> str:
    """Returns a sentence about the cells that failed, or nothing."""
    failed = [record for record in records if "failed" in record]
    return f"{len(failed)} of {len(records)} cells became infinite and are left out.\n" if failed else ""


def task_of(record: Record) -> str:
    """Returns the name of the task of a line."""
    return Path(record["train"]["data"]).stem


def by_seed(records: Sequence[Record]) -> dict[int, Record]:
    """Returns seed -> record, in the order of the seeds; of several lines of a seed the newest."""
    newest = {record["train"]["seed"]: record for record in records}
    return dict(sorted(newest.items()))


def percent(estimate: Estimate) -> str:
    """Returns a share as 66.5 ± 1.2, in percent; a single value without a spread."""
    return number(Estimate(*(100 * value for value in estimate)), 1)


def number(estimate: Estimate, digits: int) -> str:
    """Returns 2.440 ± 0.012, half the interval; a single value is said to be one."""
    margin = (estimate.high - estimate.low) / 2
    return f"{estimate.value:.{digits}f} " + (f"± {margin:.{digits}f}" if math.isfinite(margin) else "(one seed)")


def of_seeds(records: Sequence[Record], field: str) -> Estimate:
    """Returns mean and 95 % interval over the seeds."""
    return mean_interval([record[field] for record in by_seed(records).values()])


def best_of_three(records: Sequence[Record]) -> str:
    """Returns the accuracy that "best of 3 seeds" is expected to report; a dash for fewer seeds."""
    values = [record["accuracy_token"] for record in by_seed(records).values()]
    return f"{100 * expected_best(values, 3):.1f}" if len(values) >= 3 else "-"


def compared(records: Sequence[Record], baseline: Sequence[Record]) -> list[str]:
    """Returns how the records differ from the baseline, in points: over paired seeds, over questions, exact p value."""
    ours, theirs = by_seed(records), by_seed(baseline)
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds or records is baseline:
        return ["-", "-", "-"]
    over_seeds = mean_interval([ours[seed]["accuracy_token"] - theirs[seed]["accuracy_token"] for seed in seeds])
    first, second = (np.stack([correctness(side[seed]) for seed in seeds]) for side in (ours, theirs))
    over_questions, test = paired_bootstrap(first, second), sign_test(first, second)
    low, high = 100 * over_questions.low, 100 * over_questions.high
    return [percent(over_seeds), f"{low:+.1f} to {high:+.1f}", f"{test.p_value:.3f} ({test.wins} : {test.losses})"]


def stable_share(records: Sequence[Record]) -> str:
    """Returns how many matrices became stable, and the median step at which they did; a dash without flags."""
    steps = [step for record in records for pair in record.get("stable_at", {}).values() for step in pair]
    reached = [step for step in steps if step]
    if not reached:
        return f"0 of {len(steps)}" if steps else "-"
    return f"{len(reached)} of {len(steps)}, step {int(np.median(reached))}"
