"""How the lines of cells become rows of tables: groups, numbers with their intervals, comparisons."""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from experiments.running.cells import Record, cell_of, correctness
from stable_lora_jax.evaluation import (
    Estimate,
    expected_best,
    holm,
    mean_interval,
    paired_bootstrap,
    paired_p_value,
    sign_flip_p_value,
)
from stable_lora_jax.finetune import options_of

Key = TypeVar("Key", bound=Hashable)

# What belongs to methods: the options in which the methods of one table differ.
OF_METHODS = ("method", "lam", "lam_schedule", "stop_when_stable", "ratio", "decay_only_a")
# What `scored` returns.
SCORES = ("seeds", "accuracy, %", "summed, %", "best of 3", "minus AdamW", "p", "over questions", "p")
SCORES = (*SCORES, "nats per token", "minus AdamW", "p", "stable")
LEGEND = """\
± is half a 95 % interval over the seeds (Student's t). *Accuracy*: by likelihood per token; *summed*: by that of the
whole answer. *Best of 3*: what the best of three seeds is expected to show, the paper's way to report. *Minus AdamW*:
mean difference over runs of the same seed, with the p value of a paired t test; it says what other seeds may give.
*Over questions*: 95 % bootstrap interval of the difference in accuracy, for these runs and other questions, with the p
value of a permutation test (McNemar's, if there is one seed). *Nats*: negative log-likelihood of the right answers. The
p values of a column are corrected (Holm) for the number of comparisons in that column of that table, runs that came out
the same counted once; the intervals are not corrected. With two or three seeds a t test leans on differences being
normal: signs alone could not give p below 0.5 or 0.25. *Stable*: matrices that stopped shrinking, and the median step
at which these did; in brackets where they met the condition and shrink on.
"""


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
    # Read as today's configuration, so that lines from before an option existed are not of another setting.
    whole = cell_of(record).fingerprint()
    whole |= options_of(whole.pop("train"))
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
                f"The cells {other['key']} and {record['key']} have the same seed and different settings. Take the "
                "lines of one of them out of the results."
            )
    return dict(sorted(found.items()))


def percent(estimate: Estimate) -> str:
    """Returns a share as 66.5 ± 1.2, in percent; a single value without a spread."""
    return number(Estimate(*(100 * value for value in estimate)), 1)


def number(estimate: Estimate, digits: int) -> str:
    """Returns 2.440 ± 0.012, half the interval; a single value is said to be one, an unknown one is a dash."""
    if math.isnan(estimate.value):
        return "-"
    margin = (estimate.high - estimate.low) / 2
    return f"{estimate.value:.{digits}f} " + (f"± {margin:.{digits}f}" if math.isfinite(margin) else "(one seed)")


def seeds_text(*counts: int) -> str:
    """Returns "1 seed", "2 seeds", or "1 to 3 seeds" of rows with different numbers of them."""
    told = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{told} seed" if told == "1" else f"{told} seeds"


def of_seeds(records: Sequence[Record], field: str) -> Estimate:
    """Returns mean and 95 % interval over the seeds; NaN where it was not measured."""
    return mean_interval([record.get(field, math.nan) for record in by_seed(records).values()])


def made_by(groups: Mapping[Any, Sequence[Record]]) -> str:
    """Returns what made the lines: machines (and which groups, if there are several), commits, minutes."""
    machines: dict[str, dict[str, dict[str, None]]] = {}
    for key, records in groups.items():
        name = key if isinstance(key, str) else " ".join(map(str, key))
        for record in records:
            made = machines.setdefault(record["machine"]["cpu"], {"commits": {}, "groups": {}})
            made["commits"][record["commit"]] = made["groups"][name] = None
    told = [
        f"on {cpu} at {', '.join(made['commits'])}" + (f" ({', '.join(made['groups'])})" if len(machines) > 1 else "")
        for cpu, made in machines.items()
    ]
    minutes = [
        (record["train_seconds"] + record["score_seconds"]) / 60
        for records in groups.values()
        for record in records
        if record.get("train_seconds") is not None
    ]
    taken = (
        f" A cell took {np.median(minutes):.0f} minutes ({min(minutes):.0f} to {max(minutes):.0f})." if minutes else ""
    )
    return f"Measured {'; '.join(told)}.{taken}\n\n"


def best_of_three(records: Sequence[Record]) -> str:
    """Returns the accuracy that "best of 3 seeds" is expected to report; a dash for fewer seeds."""
    values = [record["accuracy_token"] for record in by_seed(records).values()]
    return f"{100 * expected_best(values, 3):.1f}" if len(values) >= 3 else "-"


def scored(groups: Mapping[Key, Sequence[Record]], baseline: Callable[[Key], Key]) -> dict[Key, list[str]]:
    """Returns the columns `SCORES` of every group of seeds, each compared with the group that `baseline` names."""
    pairs = {key: (groups[key], groups[baseline(key)]) for key in groups if baseline(key) in groups.keys() - {key}}
    differing = {key: found for key, pair in pairs.items() if (found := compared(*pair))}
    unlike = list(dict.fromkeys(differing.values()))
    p_values = zip(*(holm([getattr(each, p) for each in unlike]) for p in _P_VALUES), strict=True)
    corrected = {
        each: each._asdict() | dict(zip(_P_VALUES, p, strict=True)) for each, p in zip(unlike, p_values, strict=True)
    }
    rows = {}
    for key, each in groups.items():
        found = corrected[differing[key]] if key in differing else None
        rows[key] = [str(len(by_seed(each))), percent(of_seeds(each, "accuracy_token"))]
        rows[key] += [percent(of_seeds(each, "accuracy_sum")), best_of_three(each)]
        if found:
            low, high = (f"{100 * end:+.1f}" for end in found["over_questions"][1:])
            rows[key] += [percent(found["points"]), _p(found["p_points"]), f"{low} to {high}", _p(found["p_questions"])]
        else:
            rows[key] += ["-"] * 4
        rows[key].append(number(of_seeds(each, "nll_token"), 3))
        rows[key] += [number(found["nats"], 3), _p(found["p_nats"])] if found else ["-"] * 2
        rows[key].append(stable_share(each))
    return rows


class Comparison(NamedTuple):
    """How runs differ from others of the same seeds: in accuracy, over seeds and over questions, and in nats."""

    points: Estimate
    p_points: float
    over_questions: Estimate
    p_questions: float
    nats: Estimate
    p_nats: float


def difference(found: Comparison) -> str:
    """Returns a comparison that stands alone as words."""
    points, nats = percent(found.points), number(found.nats, 3)
    return f"{points} points, {nats} nats (p {_p(found.p_points)} and {_p(found.p_nats)}, uncorrected)"


_P_VALUES = ("p_points", "p_questions", "p_nats")


def compared(records: Sequence[Record], baseline: Sequence[Record]) -> Comparison | None:
    """Returns how the runs differ from the baseline's of the same seeds; None where they share no seed."""
    ours, theirs = by_seed(records), by_seed(baseline)
    if not (seeds := [seed for seed in ours if seed in theirs]):
        return None
    nats = [ours[seed].get("nll_token", math.nan) - theirs[seed].get("nll_token", math.nan) for seed in seeds]
    first, second = (np.stack([correctness(side[seed]) for seed in seeds]) for side in (ours, theirs))
    points = (first - second).mean(1)
    over_questions = paired_bootstrap(first, second), sign_flip_p_value(first, second)
    return Comparison(
        *(mean_interval(points), paired_p_value(points)), *over_questions, *(mean_interval(nats), paired_p_value(nats))
    )


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def stable_share(records: Sequence[Record]) -> str:
    """Returns how many matrices became stable, and the median step at which they did; a dash where nothing shrinks.

    In brackets where that stopped nothing.
    """
    shrunk = [record for record in records if record["train"]["method"] == "stable-lora"]
    steps = [step for record in shrunk for pair in record.get("stable_at", {}).values() for step in pair]
    reached = [step for step in steps if step]
    if not reached:
        return f"0 of {len(steps)}" if steps else "-"
    told = f"{len(reached)} of {len(steps)}, step {int(np.median(reached))}"
    return told if shrunk[0]["train"].get("stop_when_stable", True) else f"({told})"
