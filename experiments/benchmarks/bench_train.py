"""Benchmark: seconds a training step, against PEFT on torch (eager and compiled) and a bare hand-written JAX step.

Question:  SmolLM2-135M, LoRA r = 8 on q and v, AdamW + the shrink, batch 8, rows of 64 and 128 tokens of which the
           last 8 are answers, float32 and bfloat16 base: how long is a step, what compiles, how much memory, and what
           does the shrink cost?
Command:   make bench        (or python -m experiments.benchmarks.bench_train --torch-python PATH; without it, no PEFT)
Hardware:  2 CPU cores with nothing else running. Minutes: about 50.
Observed:  on an EPYC of the Zen 4 generation it is faster than the bare step, by 9 to 18 %, 1.00 and 0.97 times as fast
           as the faster peer in float32, 1.01 and 1.00 times in bfloat16, and takes 1.4 and 1.6 to 1.7 times the
           matrix products' floor; on one without AVX-512 it was 1.04 and 1.12 times as fast in float32. On a Xeon
           without AMX (one turn, float32) it is 0.71 and 0.79 times as fast as compiled PEFT, and 1.4 times the floor.

Every contender runs in a process of its own; rounds alternate between them, so that a drifting machine hits all alike.
All get pages of 2 MB where Linux offers them; ours, and PEFT compiled, are also timed with pages of 4 kB. XLA on a CPU
takes the buffers of each step from the system and gives them back, so the kernel hands out their pages again each time.
The floor is 4 FLOPs per frozen weight and token (forward, and backward to the activations; no weight gradients) over
the rate of a product of the model's own shapes, measured in each round, in XLA and in torch.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.benchmarks.in_turns import LARGE_PAGES, SMALL_PAGES, measured_by, write
from experiments.running.markdown import markdown
from experiments.running.provenance import commit, machine

SMALL = "-small-pages"
CONTENDERS = ("ours", f"ours{SMALL}", "bare", "peft", "peft-compiled", f"peft-compiled{SMALL}")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time training steps of all contenders in turns, and write a JSON file."""

    out: Path = Path("experiments/results/bench_train.json")
    """The file to write."""
    torch_python: str | None = None
    """A Python with the torch extra; PEFT is left out without it."""
    lengths: tuple[int, ...] = (64, 128)
    """Row lengths in tokens."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of the base model."""
    rounds: int = 3
    """Turns of each contender."""
    steps: int = 5
    """Timed steps a turn."""
    worker: Literal["", "ours", "bare", "peft", "peft-compiled"] = ""
    """Internal: time one contender in this process and print a line of JSON."""


def main(config: BenchConfig) -> None:
    if config.worker:
        from experiments.benchmarks import bench_workers

        print(json.dumps(bench_workers.run(config.worker, config.lengths[0], config.dtypes[0], config.steps)))
        return
    # Cells that are not measured anew stay: other sizes, and other machines'.
    anew = [(machine(), dtype, length) for dtype in config.dtypes for length in config.lengths]
    before = json.loads(config.out.read_text())["cells"] if config.out.exists() else []
    kept = [cell for cell in before if (cell["machine"], cell["dtype"], cell["length"]) not in anew]
    cells: list[dict[str, Any]] = []
    for dtype in config.dtypes:
        for length in config.lengths:
            turns: dict[str, list[dict[str, Any]]] = {
                name: [] for name in CONTENDERS if not name.startswith("peft") or config.torch_python
            }
            for number in range(config.rounds):
                for name in turns:
                    turns[name].append(turn(config, name, length, dtype))
                    print(f"{dtype} {length} round {number + 1} {name}: {turns[name][-1]['seconds']}", flush=True)
            cell = {"dtype": dtype, "length": length, "commit": commit(), "machine": machine()}
            cells.append(cell | {name: summary(each) for name, each in turns.items()})
            result = write(config.out, "make bench", cells=cells + kept)
            print(table(result), flush=True)


def turn(config: BenchConfig, name: str, length: int, dtype: str) -> dict[str, Any]:
    """Returns what one contender measured in a process of its own."""
    python = config.torch_python if name.startswith("peft") else sys.executable
    worker, small, _ = name.partition(SMALL)
    options = ["--worker", worker, "--lengths", str(length), "--dtypes", dtype, "--steps", str(config.steps)]
    pages = SMALL_PAGES if small else LARGE_PAGES
    return measured_by("experiments.benchmarks.bench_train", options, str(python), pages)


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over all turns."""
    seconds = [second for each in turns for second in each["seconds"]]
    merged = {"median_seconds": round(statistics.median(seconds), 4)}
    merged |= {"min_seconds": round(min(seconds), 4), "max_seconds": round(max(seconds), 4)}
    merged["steps"] = len(seconds)
    for key, value in turns[0].items():
        if key != "seconds":
            merged[key] = statistics.median(each[key] for each in turns) if isinstance(value, float) else value
    return merged


def table(result: dict[str, Any]) -> str:
    """Returns the README's table."""
    header = ("processor", "base", "length", "ours, s", "in 4 kB pages, s", "bare JAX, s", "PEFT on torch, s")
    header += ("compiled, s", "compiled, in 4 kB pages, s")
    header += ("the faster / ours", "floor in XLA, s", "ours / floor", "floor in torch, s", "compile, s", "memory, GB")
    rows = []
    for cell in result["cells"]:
        ours, bare, peft = cell["ours"], cell["bare"], cell.get("peft", {})
        peers = ("peft", "peft-compiled", f"peft-compiled{SMALL}")
        theirs = [cell.get(name, {}).get("median_seconds") for name in peers]
        known = [seconds for seconds in theirs if seconds]
        processor = filter(None, (cell["machine"].get(name) for name in ("cpu", "instructions")))
        row = [", ".join(processor), cell["dtype"], cell["length"]]
        small = cell.get(f"ours{SMALL}", {}).get("median_seconds")
        row += [f"{ours['median_seconds']:.2f}", f"{small:.2f}" if small else "-", f"{bare['median_seconds']:.2f}"]
        row += [f"{seconds:.2f}" if seconds else "-" for seconds in theirs]
        row += [f"{min(known) / ours['median_seconds']:.2f}" if known else "-", f"{ours['floor_seconds']:.2f}"]
        row += [f"{ours['median_seconds'] / ours['floor_seconds']:.2f}"]
        row += [f"{peft['floor_seconds']:.2f}" if peft else "-"]
        rows.append([*row, f"{ours['compile_seconds']:.1f}", f"{ours['peak_gigabytes']:.2f}"])
    return markdown(header, rows)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
