"""Idle share: how much of a training step the device waits, read from a trace of jax.profiler.

Question:  does anything around the step (data, metrics, checkpoints) keep the device waiting?
Command:   python -m experiments.benchmarks.idle_share
Hardware:  any; on a CPU the device is XLA's own threads. Minutes: one, for twelve steps.
Expected:  (2026-11-28) below 2 % on two cores: a batch is ready and metrics are fetched a step late.
Observed:  0.3 %; the longest gap is 30 ms.

A run of `stable_lora_jax.finetune` as a user starts it, on rows of 64 tokens, the benchmarks' shortest. Norms are
recorded and metrics written every step; a checkpoint falls into the window. What counts as busy is the union of the
events on the device's lines, from the dispatch of the fourth step to that of the last.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import tyro

from experiments.benchmarks.in_turns import write
from stable_lora_jax.finetune import RunConfig, finetune

SKIPPED = 3  # steps before the window: the first compiles
# Lines of XLA's threads on a CPU, and of streams on GPUs; planes of TPUs hold nothing but device time.
_CPU_LINES = ("tf_XLAExecute", "tf_XLAEigen", "tf_XLATfrtCpuClient")
_MARKS = ("ThreadpoolListener::", "end: ")  # no work, but notes of when it is handed over

Interval: TypeAlias = tuple[float, float]
Trace: TypeAlias = Any  # jax.profiler.ProfileData


@dataclass(frozen=True, kw_only=True)
class IdleShareConfig:
    """Train a few steps under jax.profiler and tell the share of time in which the device idles."""

    model: str = "smollm2-135m"
    """The base model, as `stable-lora train` takes it."""
    data: str = "arc_easy"
    """The data, too."""
    dtype: str = "bfloat16"
    """Of the base."""
    max_length: int = 64
    """Tokens per row."""
    steps: int = 12
    """Steps of the run."""
    out: Path = Path("experiments/results/idle_share.json")
    """The result."""


def trace_of_run(config: IdleShareConfig, folder: Path) -> Trace:
    """Returns the trace of a run whose directory is in `folder`."""
    run = RunConfig.of(
        model=config.model,
        data=config.data,
        dtype=config.dtype,
        loss="answer",
        max_length=config.max_length,
        too_long="skip",
        steps=config.steps,
        save_every=config.steps // 2,
        norms_every=1,
        run_dir=folder / "run",
    )
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what is measured
    with jax.profiler.trace(folder / "trace", profiler_options=options):
        finetune(run)
    (file,) = (folder / "trace").rglob("*.xplane.pb")
    return jax.profiler.ProfileData.from_file(str(file))


def busy_intervals(trace: Trace) -> list[Interval]:
    """Returns (start, end) in nanoseconds of everything that the device did."""
    found = []
    for plane in trace.planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device or line.name.startswith(_CPU_LINES):
                found += [
                    (event.start_ns, event.start_ns + event.duration_ns)
                    for event in line.events
                    if not event.name.startswith(_MARKS)
                ]
    return found


def dispatches(trace: Trace, name: str = "PjitFunction(step)") -> list[float]:
    """Returns when each step was handed to the device, in nanoseconds."""
    events = (event for plane in trace.planes for line in plane.lines for event in line.events)
    found = sorted((event.start_ns, event.duration_ns) for event in events if event.name == name)
    starts, end = [], 0.0
    for start, duration in found:  # a call is noted twice, one note within the other
        if start >= end:
            starts.append(start)
            end = start + duration
    return starts


def gaps(busy: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """Returns the intervals within [start, end] in which nothing is busy.

    >>> gaps([(0, 2), (1, 3), (5, 6), (6, 9)], 1, 8)
    [(3, 5)]
    """
    found, at = [], start
    for first, last in sorted(busy):
        if first > at:
            found.append((at, min(first, end)))
        at = max(at, last)
        if at >= end:
            return found
    return [*found, (at, end)]


def measured(trace: Trace) -> dict[str, Any]:
    """Returns the steps in the window, its seconds, and the share and the longest of its gaps."""
    starts = dispatches(trace)[SKIPPED:]
    if len(starts) < 2:
        raise ValueError(f"The trace holds {len(starts)} steps after the first {SKIPPED}. Train for more.")
    window: Sequence[float] = (starts[0], starts[-1])
    idle = [end - start for start, end in gaps(busy_intervals(trace), *window)]
    seconds = (window[1] - window[0]) / 1e9
    return {
        "steps": len(starts) - 1,
        "seconds_per_step": round(seconds / (len(starts) - 1), 4),
        "idle_share": round(sum(idle) / 1e9 / seconds, 5),
        "longest_gaps_ms": [round(each / 1e6, 2) for each in sorted(idle, reverse=True)[:5]],
    }


def main(config: IdleShareConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measured(trace_of_run(config, Path(folder)))
    settings = {"model": config.model, "data": config.data, "dtype": config.dtype, "max_length": config.max_length}
    print(write(config.out, "python -m experiments.benchmarks.idle_share", **settings, **found))


if __name__ == "__main__":
    main(tyro.cli(IdleShareConfig))
