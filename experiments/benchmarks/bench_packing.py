"""Benchmark: useful tokens per second on real text, packed and padded, against PEFT padded and packed, in turns.

Question:  SmolLM2-135M, LoRA r = 8 on q and v, AdamW, 8 examples per step, float32: how many tokens without padding
           does a step learn from in a second, where rows hold several examples, and where they are padded?
Command:   python -m experiments.benchmarks.bench_packing --torch-python PATH  (--data FILE for text besides ARC-Easy;
           GSM8K's is the file of solutions that experiments.studies.cot writes into runs/data)
Hardware:  2 CPU cores with nothing else running. Minutes: 15 for ARC-Easy with --steps 8; 30 for GSM8K
           with --steps 3 --rounds 2.
Expected:  (2026-11-29) packed, ours learns 1.2 times as fast as padded (0.94 / 0.80 of the tokens are real), and both
           are level with PEFT's of the same kind in float32 on a CPU, where most of a step is matrix products.
Observed:  ours packed is 1.07 and 1.05 times as fast as padded, whose rows are 83 % real on the batches timed; 1.13 and
           1.07 times as fast as PEFT's padded rows, 1.18 and 1.96 times as its packed ones. Twice the padded peer
           cannot be had where steps are bound by products: padding is a sixth of them.

PEFT's padded rows are as wide as the longest of their batch, and batches are made of rows of about one length
(transformers' LengthGroupedSampler). Its packed ones are one row of all examples of a batch, whose positions begin
anew with each, by which transformers masks attention; the output layer is applied to answer tokens alone, which
Trainer's own loss does not do. Compilation, and every shape's first step, are told apart.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.benchmarks.in_turns import measured_by, write
from experiments.running.markdown import markdown
from experiments.running.provenance import machine

CONTENDERS = ("ours packed", "ours padded", "peft padded", "peft packed")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time training on real text, contenders in turns, and write a JSON file."""

    out: Path = Path("experiments/results/bench_packing.json")
    """The file to write."""
    torch_python: str | None = None
    """A Python with the torch extra; PEFT is left out without it."""
    data: tuple[str, ...] = ("arc_easy",)
    """Question sets, or JSONL files with prompt and completion."""
    model: str = "smollm2-135m"
    """Base model."""
    rounds: int = 3
    """Turns of each contender."""
    steps: int = 16
    """Timed steps a turn."""
    max_length: int = 512
    """Longer examples are left out."""
    worker: Literal["", "ours packed", "ours padded", "peft padded", "peft packed"] = ""
    """Internal: time one contender in this process and print a line of JSON."""


def main(config: BenchConfig) -> None:
    if config.worker:
        from experiments.benchmarks import packing_workers

        kind, rows = config.worker.split()
        run = {"ours": packing_workers.ours, "peft": packing_workers.peft}[kind]
        print(json.dumps(run(config.data[0], config.model, rows == "packed", config.steps, config.max_length)))
        return
    # Sets that were measured before stay, each with its machine.
    sets = json.loads(config.out.read_text())["sets"] if config.out.exists() else []
    for data in config.data:
        sets = [each for each in sets if each["data"] != Path(data).stem]
        turns: dict[str, list[dict[str, Any]]] = {
            name: [] for name in CONTENDERS if name.startswith("ours") or config.torch_python
        }
        for number in range(config.rounds):
            for name in turns:
                python = config.torch_python if name.startswith("peft") else sys.executable
                options = ["--worker", name, "--data", data, "--model", config.model]
                options += ["--steps", str(config.steps), "--max-length", str(config.max_length)]
                turns[name].append(measured_by("experiments.benchmarks.bench_packing", options, str(python)))
                print(f"{data} round {number + 1} {name}: {turns[name][-1]}", flush=True)
        how = {"data": Path(data).stem, "rounds": config.rounds, "steps": config.steps, "machine": machine()}
        sets.append(how | {name: summary(each) for name, each in turns.items()})
        result = write(config.out, "python -m experiments.benchmarks.bench_packing", sets=sets)
        print(table(result), flush=True)


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians of all turns."""
    numbers = {key: statistics.median(each[key] for each in turns) for key in turns[0].keys() - {"versions"}}
    return numbers | {"versions": turns[0]["versions"]}


def table(result: dict[str, Any]) -> str:
    """Returns a Markdown table of the useful tokens per second."""
    rows = []
    for each in result["sets"]:
        fastest = each["ours packed"]["tokens_per_second"]
        for name in CONTENDERS:
            if found := each.get(name):
                rate = found["tokens_per_second"]
                told = f"{rate:.0f}", f"{fastest / rate:.2f}", f"{found['useful']:.0%}", f"{found['first_seconds']:.0f}"
                rows.append([each["data"], name, *told])
    return markdown(("data", "rows", "useful tokens / s", "ours packed is faster by", "useful", "first steps, s"), rows)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
