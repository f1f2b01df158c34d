"""Plan: what Stable-LoRA training of Llama-3.2-1B and 3B takes on 16 and on 256 TPU v5e chips.

Question:  does the step fit, what binds it, how many tokens per second do the chips' published rates allow?
Command:   make plan            (needs libtpu, no TPU)
Hardware:  2 CPU cores. Minutes: 8 to 20; `planning_seconds` in each file.
Observed:  all four fit; the step for 256 chips compiles as the one for 16 does. With all scores of a row written out
           (2026-11-22) a chip held 3.13 and 4.44 GiB, with the splash kernel (2026-11-29) 1.48 and 3.24.

The real step, bfloat16 base, LoRA r = 8 on q and v, rows of 1024 tokens that are all predicted, weights split over all
chips of a slice of 16, and over 16 chips in each of 16 copies on 256. Seconds are not measured: see `planning.plan`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.running.markdown import markdown
from experiments.running.provenance import commit
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Workload, parse_topology, plan_step

MODELS = ("llama-3.2-1b", "llama-3.2-3b")
SLICES = {"v5e:4x4": {"fsdp": 16}, "v5e:16x16": {"data": 16, "fsdp": 16}}
ROWS_A_CHIP, LENGTH = 4, 1024


@dataclass(frozen=True, kw_only=True)
class PlanTablesConfig:
    """Compile the four steps; write a JSON file each, and a table of all."""

    out: Path = Path("experiments/results/plan")
    """The folder to write."""


def main(config: PlanTablesConfig) -> None:
    jax.config.update("jax_platforms", "cpu")  # only compiled for: no TPU is looked for
    config.out.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        for name, sizes in SLICES.items():
            topology, start = parse_topology(name), time.perf_counter()
            workload = Workload(
                config=KNOWN_CONFIGS[model],
                rows=ROWS_A_CHIP * topology.chips,
                length=LENGTH,
                num_targets=LENGTH,
                remat=True,
            )
            plan = plan_step(workload, topology, sizes, use_compiler=True)
            seconds = round(time.perf_counter() - start, 1)
            record = {
                "command": "make plan",
                "commit": commit(),
                "model": model,
                "planning_seconds": seconds,
                **plan.to_json(),
            }
            file = config.out / file_name(model, name)
            file.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{file}: {seconds} s", flush=True)
    print(table(config.out))


def file_name(model: str, slice_name: str) -> str:
    return f"{model}-{slice_name.replace(':', '-')}.json"


def table(folder: Path) -> str:
    """Returns a Markdown table of the plans in a folder."""
    files = [folder / file_name(model, name) for model in MODELS for name in SLICES]
    records: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files if file.exists()]
    header = (
        "model",
        "slice",
        "mesh",
        "rows",
        "memory per chip, GiB",
        "TFLOP per chip",
        "links, GiB per chip",
        "binds",
    )
    header += ("step, s", "tokens per second")
    rows = []
    for record in records:
        memory, step, tokens = record["memory_per_chip"], record["step_seconds"], record["tokens_per_second"]
        mesh = ", ".join(f"{name}={size}" for name, size in record["mesh"].items() if size > 1)
        links = sum(each["bytes"] for each in record["collectives"])
        cells = [
            *(record["model"], record["topology"], mesh, record["step"]["rows"]),
            f"{memory['total'] / 2**30:.2f} of {memory['available'] / 2**30:.0f}",
            f"{record['flops_per_chip'] / 1e12:.1f}",
            f"{links / 2**30:.2f}",
            record["binds"],
            f"{step['least']:.3f} to {step['most']:.3f}",
            f"{tokens['least']:,.0f} to {tokens['most']:,.0f}",
        ]
        rows.append(cells)
    return markdown(header, rows) + "\n"


def report(results: Path) -> str:
    """Returns the table, if there are plans."""
    return table(results / "plan") if (results / "plan").exists() else ""


if __name__ == "__main__":
    main(tyro.cli(PlanTablesConfig))
