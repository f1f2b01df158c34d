"""Benchmark: a whole run of one epoch, from its configuration to its adapter, packed and padded, in turns.

Question:  SmolLM2-135M, LoRA r = 8 on q and v, one epoch of ARC-Easy, 8 questions per step, float32: how many seconds
           does the run take with all its compilation, where rows hold several examples, and where they are padded?
Command:   python -m experiments.benchmarks.bench_epoch    (--dtype bfloat16; --first-version a checkout of c2c144c)
Hardware:  2 CPU cores with nothing else running. Minutes: 10 to 30.
Expected:  (2026-11-29) packed takes 0.75 of the padded run's seconds on cores of 54 GFLOP/s, where a step takes 2.4
           seconds; the faster the machine, the more of the padded run is compilation.
           (2026-11-29) On cores of 200 GFLOP/s it takes 0.85 of today's padded run and 0.65 of the first version's in
           float32; in bfloat16, 380 GFLOP/s, 0.8 and 0.5.
Observed:  0.88 in float32 on cores of 54 GFLOP/s (696 and 787 seconds, 8 and 77 of them compilation). In bfloat16 on
           those of 380, 0.86 of both (175, 204 and 205 seconds): on a CPU the first version's padded steps are as
           fast as today's, and what packing saves is compilation.

A run is `stable_lora_jax.finetune` in a process of its own, without the persistent compilation cache that commands
have: what is measured is a first run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.benchmarks.in_turns import LARGE_PAGES, measured_by, write
from experiments.running.markdown import markdown
from experiments.running.provenance import versions

CONTENDERS = ("packed", "padded", "first version, padded")

# Run in a checkout of the first version (commit c2c144c), whose training command was a function of one configuration.
FIRST_VERSION = """
import json, pathlib, sys, tempfile, time
import jax
from stable_lora_jax.cli.train import TrainConfig, train_command
compiled = []
def heard(event, duration_secs, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(duration_secs)
jax.monitoring.register_event_duration_secs_listener(heard)
with tempfile.TemporaryDirectory() as folder:
    options = json.loads(sys.argv[1]) | {"run_dir": pathlib.Path(folder, "run")}
    start = time.perf_counter()
    steps = train_command(TrainConfig(**options)).steps
    seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "steps": steps, "compile_seconds": sum(compiled)}))
"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time whole runs in turns, and write a JSON file."""

    out: Path = Path("experiments/results/bench_epoch.json")
    """The file to write."""
    data: str = "arc_easy"
    """A question set."""
    model: str = "smollm2-135m"
    """Base model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base."""
    epochs: float = 1.0
    """Passes over the data."""
    rounds: int = 1
    """Turns of each contender."""
    first_version: Path | None = None
    """A checkout of commit c2c144c, whose padded rows, attention and backward pass were others; left out without it."""
    worker: Literal["", "packed", "padded"] = ""
    """Internal: time one contender in this process and print a line of JSON."""


def run(config: BenchConfig) -> dict[str, Any]:
    """Returns the seconds of one run, its steps and the seconds that JAX spent in compiling."""
    import jax

    from stable_lora_jax.finetune import RunConfig, finetune

    compiled: list[float] = []

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(config) | {"pack": config.worker == "packed", "run_dir": Path(folder, "run")}
        start = time.perf_counter()
        done = finetune(RunConfig.of(**options))
        seconds = time.perf_counter() - start
    found = {"seconds": seconds, "steps": done.steps, "compile_seconds": sum(compiled)}
    return found | {"versions": versions("jax", "flax", "optax")}


def options_of(config: BenchConfig) -> dict[str, Any]:
    """Returns the options of a run of any contender."""
    names = ("model", "data", "dtype", "epochs")
    return {name: getattr(config, name) for name in names} | {"loss": "answer"}


def run_of_first_version(config: BenchConfig) -> dict[str, Any]:
    """Returns the same of a run of the first version, with the interpreter and libraries of this one."""
    command = [sys.executable, "-c", FIRST_VERSION, json.dumps(options_of(config))]
    environment = {**os.environ, **LARGE_PAGES}
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, cwd=config.first_version, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"versions": versions("jax", "flax", "optax")}


def main(config: BenchConfig) -> None:
    if config.worker:
        print(json.dumps(run(config)))
        return
    contenders = CONTENDERS if config.first_version else CONTENDERS[:-1]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    how = {"data": config.data, "dtype": config.dtype, "epochs": config.epochs, "rounds": config.rounds}
    for number in range(config.rounds):
        for name in contenders:
            if name == CONTENDERS[-1]:
                turns[name].append(run_of_first_version(config))
                print(f"round {number + 1} {name}: {turns[name][-1]}", flush=True)
                continue
            options = ["--worker", name, "--data", config.data, "--model", config.model]
            options += ["--dtype", config.dtype, "--epochs", str(config.epochs)]
            turns[name].append(measured_by("experiments.benchmarks.bench_epoch", options))
            print(f"round {number + 1} {name}: {turns[name][-1]}", flush=True)
    found = {name: summary(each) for name, each in turns.items()}
    print(table(write(config.out, "python -m experiments.benchmarks.bench_epoch", **how, **found)))


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians of all turns."""
    medians = {key: statistics.median(each[key] for each in turns) for key in ("seconds", "compile_seconds")}
    return medians | {key: turns[0][key] for key in ("steps", "versions")}


def table(result: dict[str, Any]) -> str:
    """Returns a Markdown table of the seconds of a run."""
    packed = result["packed"]["seconds"]
    rows = []
    for name in filter(result.get, CONTENDERS):
        each = result[name]
        told = f"{each['seconds']:.0f}", f"{packed / each['seconds']:.2f}", f"{each['compile_seconds']:.0f}"
        rows.append([name, each["steps"], *told])
    return markdown(("rows", "steps", "seconds of the run", "packed / this", "of them compilation, s"), rows)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
