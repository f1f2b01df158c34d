"""Cells: the runs that an experiment is made of, and the lines that they leave.

A cell is a training configuration and how it is scored; its key is a hash of both, so a cell means the same wherever it
stands (a .jsonl file counts by its name: give a changed one another). `run_cells` skips those that have a line in the
results already. A run that was killed is in its run directory, named by the experiment and the key, and goes on from
its newest checkpoint.

A line of experiments/results/NAME.jsonl is one finished cell: configuration, scores with every question's right or
wrong as a string of 1 and 0 (so that two cells can be compared question by question), steps at which the matrices
became stable, seconds, commit, versions and machine. Tables and figures are made from these lines alone (`make
results`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock

from experiments.running.provenance import provenance
from experiments.running.shared import scored, shared_questions, trained_model
from stable_lora_jax.evaluation import NonFiniteScoreError
from stable_lora_jax.finetune import (
    MethodConfig,
    RunConfig,
    finetune,
    fingerprint,
    numbers_of,
    options_of,
)
from stable_lora_jax.training import NonFiniteLossError, RunDirectory, read_metrics, stop_steps

Record: TypeAlias = dict[str, Any]
_STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment takes."""

    model: str = "smollm2-135m"
    """An alias, a Hugging Face directory or hub name, or a .gguf file."""
    tasks: tuple[str, ...] = ("arc_easy",)
    """Question sets: names of tasks, or .jsonl files."""
    methods: tuple[str, ...] = ("adamw", "stable-lora")
    """The methods to compare."""
    dtype: str = "bfloat16"
    """Of the base model: float32 or bfloat16."""
    score_on: str = "validation"
    """The questions reported: validation, test, or a .jsonl file."""
    steps: int | None = 68
    """Steps of a run; 68 of 8 questions take about 100 seconds on 2 cores. None passes once over all questions."""
    batch_size: int = 8
    """Questions per step."""
    save_every: int = 25
    """Steps between two checkpoints."""
    results: Path = Path("experiments/results")
    """Folder of the lines, tables and figures."""
    runs: Path = Path("runs/cells")
    """Folder of the run directories."""
    together: int = 1
    """Train up to this many cells in one program, where they differ in numbers and seed alone. It keeps no checkpoints:
    what is killed starts again."""
    part: str = "1/1"
    """Which part of the cells to run, as 3/8; the lines then go to NAME.3of8.jsonl. For arrays of jobs."""
    minutes: float | None = None
    """No run begins once this program has worked for so long; what is missing is for the next time."""
    ray: int = 0
    """Run cells as Ray tasks that take this many CPU cores each, and a GPU where there are any; 0 does without Ray."""
    smoke: bool = False
    """Try everything in seconds: a tiny model, 4 steps, and a run killed at 2 steps and resumed."""

    def __post_init__(self):
        if self.together < 1 or self.ray < 0:
            raise ValueError(f"together={self.together} is below 1, or ray={self.ray} below 0. Leave them out.")


def training(options: Options, task: str, **changes: Any) -> RunConfig:
    """Returns the run on a task that the options describe: softmax over the choices, unless changed.

    Numbers that belong to other methods than the run's are left out.
    """
    common: dict[str, Any] = {"loss": "choices"} | {
        name: getattr(options, name) for name in ("model", "dtype", "steps")
    }
    common |= {"batch_size": options.batch_size, "save_every": options.save_every}
    common |= {"method": MethodConfig.name} | changes
    return RunConfig.of(data=task, **numbers_of(common["method"], common))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run and how it is scored."""

    train: RunConfig
    score_on: str = "validation"
    """A split of its task, "holdout", or a .jsonl file of questions."""
    scoring: str = ""
    """What else its scores depend on, in an experiment that measures in a way of its own."""
    key: str = field(init=False)

    def __post_init__(self):
        text = json.dumps(self.fingerprint(), sort_keys=True)
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:16])

    def fingerprint(self) -> Record:
        """Returns what stands in the cell's line, and decides its key."""
        scored = {"score_on": self.score_on} | ({"scoring": self.scoring} if self.scoring else {})
        return {"train": fingerprint(self.train)} | scored


def cell_of(line: Record) -> Cell:
    """Returns the cell of a line as read, with today's defaults for options that the line is too old to know."""
    return Cell(train=RunConfig.of(**line["train"]), score_on=line["score_on"], scoring=line.get("scoring", ""))


Score: TypeAlias = Callable[[Cell, Path], Record]


def run_cells(name: str, cells: Sequence[Cell], options: Options, score: Score | None = None) -> list[Record]:
    """Trains and scores those of the cells that have no line yet, and returns the lines of all, in the cells' order.

    Args:
      name: the lines go to NAME.jsonl in the results' folder.
      cells: all cells of the experiment.
      options: where, and how many at once.
      score: what is measured of a trained cell, from its run directory; `score_questions` if None.

    Raises:
      SystemExit: a signal stopped a run; started again, it goes on from there.
    """
    mine, suffix = part_of(cells, options.part)
    file = options.results / f"{name}{suffix}.jsonl"
    done = finished(name, options.results)
    todo = [cell for cell in mine if cell.key not in done]
    print(f"{name}: {len(cells)} cells, {len(todo)} to run here", flush=True)
    groups = _groups(todo, options.together)
    for record in _records(groups, options, options.runs / name, score or score_questions):
        append(file, record)
        done[record["key"]] = _as_read(record)
        told = {key: record[key] for key in ("accuracy_token", "nll_token", "failed") if key in record}
        print(f"{name}: {record['key']} {told}", flush=True)
    return [done[cell.key] for cell in cells if cell.key in done]


def _records(groups: Sequence[Sequence[Cell]], options: Options, runs: Path, score: Score) -> Iterator[Record]:
    """Yields the lines of all groups, as they come: run here one after the other, or by Ray."""
    if not options.ray:
        for number, group in enumerate(groups):
            if options.minutes is not None and time.monotonic() - _STARTED > 60 * options.minutes:
                print(f"{options.minutes:g} minutes are over: {len(groups) - number} groups are left", flush=True)
                return
            yield from run_group(group, runs, score)
    elif groups:
        from experiments.running.on_ray import run_on_ray

        where = runs.resolve()  # a task may run in any directory
        yield from run_on_ray(groups, lambda group: run_group(group, where, score), options.ray)


def run_group(group: Sequence[Cell], runs: Path, score: Score) -> Iterator[Record]:
    """Trains cells at once, scores one after the other, and yields a line for each; writes run directories alone."""
    for cell, outcome in zip(group, train_cells(group, runs), strict=True):
        start = time.perf_counter()
        if "failed" not in outcome:
            try:
                outcome |= score(cell, runs / cell.key)
                outcome["score_seconds"] = round(time.perf_counter() - start, 1)
            except NonFiniteScoreError as error:
                outcome = {"failed": str(error)}
        yield {"key": cell.key} | cell.fingerprint() | outcome | provenance()


def part_of(cells: Sequence[Cell], part: str) -> tuple[list[Cell], str]:
    """Returns the cells of a part such as "3/8", which takes every eighth, and what its file's name has more.

    Raises:
      ValueError: not of that form, or a number that is not in 1 to the number of parts.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part={part!r} is not understood. Write e.g. 3/8 for the third of eight; 1/1 is everything.")
    return list(cells[int(number) - 1 :: int(count)]), "" if count == "1" else f".{number}of{count}"


def score_questions(cell: Cell, directory: Path) -> Record:
    """Returns accuracy and likelihood of a trained cell, and which questions it has right."""
    base = cell.train.model
    scores = scored(trained_model(base, directory), shared_questions(base.name, cell.train.data, cell.score_on))
    right = {"correct_sum": bits(scores.correct_sum), "correct_token": bits(scores.correct_token)}
    return {key: round(value, 6) for key, value in scores.summary().items()} | right


def bits(right: Iterable[bool]) -> str:
    """Returns 1 or 0 for every question."""
    return "".join("01"[int(one)] for one in right)


def correctness(record: Record, field: str = "correct_token") -> np.ndarray:
    """Returns 1.0 or 0.0 for every question of a line."""
    return np.array([float(bit) for bit in record[field]])


def read_lines(name: str, results: Path) -> list[Record]:
    """Returns all lines of an experiment, oldest first, those of parts included; "train" is by option."""
    files = [results / f"{name}.jsonl", *sorted(results.glob(f"{name}.*of*.jsonl"))]
    return [_as_read(line) for file in files for line in read_metrics(file)]


def _as_read(line: Record) -> Record:
    return line | {"train": options_of(line["train"])} if "train" in line else line


def as_written(line: Record) -> Record:
    """Returns a line as read, as it stands in its file: "train" is by section."""
    return line | {"train": fingerprint(RunConfig.of(**line["train"]))}


def finished(name: str, results: Path) -> dict[str, Record]:
    """Returns key -> line. Keys are made anew, as lines may be older than an option."""
    return {cell_of(line).key: line for line in read_lines(name, results)}


def lines_sharing(file: Path, same: Mapping[str, Any]) -> list[Record]:
    """Returns the lines of a file in which all have these values.

    Raises:
      ValueError: some have others, so that what would be added could not stand in a table with them.
    """
    lines = read_metrics(file)
    for line in lines:
        if other := {name: line.get(name) for name, value in same.items() if line.get(name) != value}:
            wanted = {name: same[name] for name in other}
            raise ValueError(f"{file} holds lines with {other} instead of {wanted}. Give another folder: --results.")
    return lines


def append(file: Path, record: Record) -> None:
    """Adds a line. The file is written anew and moved into place, so that a kill leaves no half line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):  # of the processes that may add lines at once
        before = file.read_text() if file.exists() else ""
        partial = file.with_name(file.name + ".partial")
        partial.write_text(before + json.dumps(record, ensure_ascii=False) + "\n")
        partial.replace(file)


def _groups(cells: Sequence[Cell], together: int) -> list[list[Cell]]:
    """Returns the cells in groups that one program can train; those that end by their validation alone, and last."""
    if together == 1:
        return [[cell] for cell in cells]
    from experiments.running.together import VARYING

    alike: dict[str, list[Cell]] = {}
    alone = [cell for cell in cells if cell.train.schedule.patience is not None]
    for cell in cells:
        if cell in alone:
            continue
        options = options_of(fingerprint(cell.train))
        rest = {name: value for name, value in options.items() if name not in VARYING}
        alike.setdefault(json.dumps(rest, sort_keys=True), []).append(cell)
    groups = [group[i : i + together] for group in alike.values() for i in range(0, len(group), together)]
    return groups + [[cell] for cell in alone]


def train_cells(group: Sequence[Cell], runs: Path) -> list[Record]:
    """Trains one cell, or several in one program; returns of each its seconds and stops, or how it failed."""
    if len(group) > 1:
        from experiments.running.together import train_together

        return train_together([cell.train.with_options(run_dir=runs / cell.key) for cell in group])
    (cell,) = group
    directory, start = runs / cell.key, time.perf_counter()
    resume = RunDirectory(directory).newest_step() is not None
    try:
        result = finetune(cell.train.with_options(run_dir=directory, resume=resume, overwrite=not resume))
    except NonFiniteLossError as error:
        return [{"failed": str(error)}]
    if result.stopped_by:
        raise SystemExit(128 + result.stopped_by)
    seconds = None if resume else round(time.perf_counter() - start, 1)  # of a resumed run, only the rest is known
    outcome = {"train_seconds": seconds, "resumed": resume, "steps": result.steps}
    return [outcome | {"stable_at": stable_at(directory)}]


def stable_at(directory: Path) -> dict[str, list[int]]:
    """Returns pair -> the step at which each matrix of a run became stable, 0 where it did not."""
    lines = RunDirectory(directory).metrics()
    norms, stops = next(line["norms"] for line in lines if "norms" in line), stop_steps(lines)
    stacks = {pair: np.shape(each["norm_a"]) for pair, each in norms.items()}
    return {pair: [stops.get(pair, {}).get(index, 0) for index in np.ndindex(shape)] for pair, shape in stacks.items()}
