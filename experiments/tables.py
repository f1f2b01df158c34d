"""How the lines of cells become rows of tables: groups, numbers with their intervals, comparisons."""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from experiments.cells import Record, correctness
from stable_lora_jax.evaluation import (
    Estimate,
    SignTest,
    expected_best,
    holm,
    mean_interval,
    paired_bootstrap,
    paired_p_value,
    sign_test,
)

Key = TypeVar("Key", bound=Hashable)

# What `scored` returns.
SCORES = ("seeds", "accuracy, %", "best of 3", "nats a token", "minus AdamW", "p", "over questions", "better : worse")
SCORES = (*SCORES, "p", "stable")
LEGEND = """\
± is half a 95 % interval over the seeds (Student's t). *Best of 3*: what the best of three seeds is expected to show,
the paper's way to report. *Nats a token*: negative log-likelihood of the right answers. *Minus AdamW*: mean difference
in points over runs of the same seed, with the p value of a paired t test; it says what other seeds may give. *Over
questions*: 95 % bootstrap interval of that difference, for these runs and other questions. *Better : worse*: questions
that more, or fewer, of the seeds have right than with AdamW, by however little, with the p value of the sign test. The
p values of a table are corrected for the number of its comparisons (Holm). *Stable*: matrices that stopped shrinking,
and the median step at which they did.
"""


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def grouped(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    """Returns key -> records, in the order in which the keys come; failed cells are left out (see `failures`)."""
    groups: dict[Key, list[Record]] = {}
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


def setting(record: Record, *varied: str) -> str:
    """Returns all that a line was trained and scored with, but for the seed and what varies within a table."""
    whole = record["train"] | {"score_on": record["score_on"]}
    return json.dumps({name: value for name, value in whole.items() if name not in ("seed", *varied)})


def by_seed(records: Sequence[Record]) -> dict[int, Record]:
    """Returns seed -> record, in the order of the seeds.

    Raises:
      ValueError: two lines of one seed, so of other settings: their mean would mean nothing.
    """
    found: dict[int, Record] = {}
    for record in records:
        other = found.setdefault(record["train"]["seed"], record)
        if other is not record:
            raise ValueError(
                f"The cells {other['key']} and {record['key']} have one seed and other values. Take the lines of one "
                "of them out of the results."
            )
    return dict(sorted(found.items()))


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


def scored(groups: Mapping[Key, Sequence[Record]], baseline: Callable[[Key], Key]) -> dict[Key, list[str]]:
    """Returns the columns `SCORES` of every group of seeds, each compared with the group that `baseline` names."""
    pairs = {key: (groups[key], groups[baseline(key)]) for key in groups if baseline(key) in groups.keys() - {key}}
    compared = {key: found for key, pair in pairs.items() if (found := _compared(*pair))}
    over_seeds = dict(zip(compared, holm([each.p_seeds for each in compared.values()]), strict=True))
    over_questions = dict(zip(compared, holm([each.test.p_value for each in compared.values()]), strict=True))
    rows = {}
    for key, each in groups.items():
        rows[key] = [str(len(by_seed(each))), percent(of_seeds(each, "accuracy_token")), best_of_three(each)]
        rows[key].append(number(of_seeds(each, "nll_token"), 3) if "nll_token" in each[0] else "-")
        if found := compared.get(key):
            rows[key] += [percent(found.difference), _p(over_seeds[key])]
            rows[key].append(f"{100 * found.over_questions.low:+.1f} to {100 * found.over_questions.high:+.1f}")
            rows[key] += [f"{found.test.wins} : {found.test.losses}", _p(over_questions[key])]
        else:
            rows[key] += ["-"] * 5
        rows[key].append(stable_share(each))
    return rows


class _Comparison(NamedTuple):
    difference: Estimate
    p_seeds: float
    over_questions: Estimate
    test: SignTest


def _compared(records: Sequence[Record], baseline: Sequence[Record]) -> _Comparison | None:
    """Returns how the runs differ from the baseline's of the same seeds; None where they share no seed."""
    ours, theirs = by_seed(records), by_seed(baseline)
    if not (seeds := [seed for seed in ours if seed in theirs]):
        return None
    differences = [ours[seed]["accuracy_token"] - theirs[seed]["accuracy_token"] for seed in seeds]
    first, second = (np.stack([correctness(side[seed]) for seed in seeds]) for side in (ours, theirs))
    over_questions, test = paired_bootstrap(first, second), sign_test(first, second)
    return _Comparison(mean_interval(differences), paired_p_value(differences), over_questions, test)


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def stable_share(records: Sequence[Record]) -> str:
    """Returns how many matrices became stable, and the median step at which they did; a dash where nothing shrinks."""
    shrunk = [record for record in records if record["train"]["method"] == "stable-lora"]
    steps = [step for record in shrunk for pair in record.get("stable_at", {}).values() for step in pair]
    reached = [step for step in steps if step]
    if not reached:
        return f"0 of {len(steps)}" if steps else "-"
    return f"{len(reached)} of {len(steps)}, step {int(np.median(reached))}"
