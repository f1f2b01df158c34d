"""Benchmark: adapters trained together in one program against as many single runs, in turns.

Question:  SmolLM2-135M, LoRA r = 8 on q and v, Stable-LoRA, batch 8 an adapter, rows of 64 tokens of which the last 8
           are answers: how many adapter steps per second, for K = 1 to 16 adapters at once, and with what memory?
Command:   make bench-sweep        (or python -m experiments.benchmarks.bench_sweep; --help)
Hardware:  2 CPU cores with nothing else running, or one GPU. Minutes: 9.
Observed:  on 2 cores about as many as single steps for K = 2, and fewer for 4 to 16, because a single batch fills them
           already; what is saved is loading and compiling K times. On an accelerator: not measured.

Every K runs in a process of its own, so that its memory is its own; single steps are timed in each, in turns with it.
Medians of six steps: those of the single step, which is the same in every row, tell how much they vary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks.bench_timing import answer_batch, peak_gigabytes, random_rows, timed
from experiments.benchmarks.in_turns import measured_by, write
from experiments.running.markdown import markdown
from experiments.running.provenance import versions


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time steps of K adapters together and of one alone, and write a JSON file."""

    out: Path = Path("experiments/results/bench_sweep.json")
    """The file to write."""
    adapters: tuple[int, ...] = (1, 2, 4, 8, 16)
    """K."""
    dtype: str = "bfloat16"
    """Of the base model."""
    length: int = 64
    """Row length in tokens."""
    steps: int = 3
    """Timed steps a turn; a turn of single steps has as many."""
    rounds: int = 2
    """Turns of each."""
    worker: int = 0
    """Internal: time this K in this process and print a line of JSON."""


def main(config: BenchConfig) -> None:
    if config.worker:
        print(json.dumps(measure(config, config.worker)))
        return
    rows = []
    for count in config.adapters:
        options = ["--worker", str(count), "--dtype", config.dtype, "--length", str(config.length)]
        options += ["--steps", str(config.steps), "--rounds", str(config.rounds)]
        rows.append(measured_by("experiments.benchmarks.bench_sweep", options))
        told = {"dtype": config.dtype, "length": config.length, "versions": versions("jax", "flax", "optax")}
        print(table(write(config.out, "make bench-sweep", **told, rows=rows)), flush=True)


def measure(config: BenchConfig, count: int) -> dict[str, Any]:
    """Returns medians of the seconds of a step of K adapters, and of one alone."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from stable_lora_jax.lora import inject_lora
    from stable_lora_jax.models import load_model
    from stable_lora_jax.training import (
        SweepPoint,
        compile_step,
        compile_sweep_step,
        init_state,
        make_loss,
        make_mesh,
        make_optimizer,
        split_model,
    )

    width = jnp.dtype(config.dtype)
    model = inject_lora(load_model("smollm2-135m", dtype=width, param_dtype=width), 8, 16.0, "qv", rngs=nnx.Rngs(0))
    graph, adapters, frozen = split_model(model)
    tokens, targets = random_rows(config.length)
    batch = jax.device_put(answer_batch(tokens, targets))
    batches = jax.tree.map(lambda x: jnp.stack([x] * count), batch)

    def optimizer(point: SweepPoint) -> Any:
        return make_optimizer("stable-lora", point.learning_rate, lam=point.lam, ratio=4, weight_decay=0, clip_norm=1)

    loss, mesh = make_loss("answer", 1), make_mesh()
    points = jax.tree.map(lambda x: jnp.full(count, x), SweepPoint(5e-4, 2.0, 0.001))
    states: dict[str, Any] = {"alone": init_state(jax.tree.map(jnp.copy, adapters), optimizer(SweepPoint(5e-4, 2.0)))}
    stacked = jax.tree.map(lambda x: jnp.stack([x] * count), adapters)
    states["together"] = jax.vmap(lambda one: init_state(one, optimizer(SweepPoint(5e-4, 2.0))))(stacked)
    alone = compile_step(graph, loss, optimizer(SweepPoint(5e-4, 2.0, 0.001)), mesh=mesh, frozen=frozen)
    together = compile_sweep_step(graph, loss, optimizer, mesh=mesh)

    def advance(name: str) -> None:
        if name == "alone":
            states[name] = jax.block_until_ready(alone(states[name], frozen, batch))[0]
        else:
            states[name] = jax.block_until_ready(together(states[name], points, frozen, batches))[0]

    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(config.rounds):
        for name, each in seconds.items():
            each += timed(lambda name=name: advance(name), config.steps)
    one, all_of_them = (float(np.median(seconds[name])) for name in ("alone", "together"))
    return {
        "adapters": count,
        "seconds_together": round(all_of_them, 4),
        "seconds_alone": round(one, 4),
        "speedup": round(count * one / all_of_them, 3),
        "peak_gigabytes": round(peak_gigabytes(), 2),
        "device": jax.devices()[0].device_kind,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the table."""
    fields = ("seconds_together", "seconds_alone", "speedup", "peak_gigabytes")
    header = ("adapters at once", "s per step together", "s per step alone", "K alone / together", "memory, GB")
    return markdown(header, ([row["adapters"], *(f"{row[each]:.2f}" for each in fields)] for row in result["rows"]))


def report(results: Path) -> str:
    """Returns the table with its machine, if it has been measured."""
    file = results / "bench_sweep.json"
    if not file.exists():
        return ""
    result = json.loads(file.read_text())
    where = f"{result['machine']['cpu']}, {result['machine']['cores']} cores, {result['rows'][0]['device']}"
    return f"{table(result)}\n\n{where}; jax {result['versions']['jax']}, base in {result['dtype']}.\n\n"


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
