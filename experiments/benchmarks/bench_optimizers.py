"""Benchmark: what one optimizer update costs, ours against each other and against torch, in turns.

Question:  48 pairs of Qwen2-0.5B (24 x q 896 -> 896 and v 896 -> 128, r = 8), float32: how long is one jitted update
           with donated buffers, how much longer than AdamW's, and what share of a training step is that?
Command:   make bench-optimizers        (or python -m experiments.benchmarks.bench_optimizers; in an environment with
           the torch extra it also times torch.optim.AdamW and PEFT's optimizers)
Hardware:  2 CPU cores with nothing else running, or one GPU. Minutes: 13.
Observed:  over AdamW, one thread: Stable-LoRA 1.25 +- 0.05 (the aim was 1.15; stacked 1.2), LoRA+ 1.0, Riemannian 1.9
           (the aim was 2; stacked 2.2), LoRA-RITE 3.1 (the aim was 5; stacked 5.6); more on a busy machine. Each is
           faster than the same on torch, but for AdamW beside torch's fused one.

The floor of an AdamW update is memory: it reads p, g, m, v and writes p, m, v, 28 bytes a parameter, 15 MB for the
540,672 parameters here. Every thread count runs in a process of its own, bound to that many cores; in it the
contenders take turns.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks.in_turns import measured_by, write
from experiments.running.markdown import markdown
from experiments.running.provenance import versions

# The length of a training step, of which the table gives shares.
TRAIN = Path("experiments/results/bench_train.json")
# (count, fan-in, fan-out) of the pairs
QWEN2_05B = ((24, 896, 896), (24, 896, 128))
SMOLLM2_135M = ((30, 576, 576), (30, 576, 192))
RANKS = (4, 8, 16, 32, 64, 128, 256)
PAIRS = (8, 32, 128, 512)
# What the paper reports for Qwen2-0.5B on a GPU: seconds of training over AdamW's.
PAPER = {"AdamW": "0", "Stable-LoRA": "+0.6%", "LoRA+": "0", "Riemannian": "+8.3%", "LoRA-RITE": "+46%"}
# Seconds after which a turn ends early: the largest ranks take that long for a few updates.
LONGEST_TURN = 1.0


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time optimizer updates in turns, and write a JSON file."""

    out: Path = Path("experiments/results/bench_optimizers.json")
    """The file to write."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of CPU threads; each runs in a process of its own."""
    rounds: int = 10
    """Turns of each contender."""
    updates: int = 20
    """Timed updates a turn."""
    worker: int = 0
    """Internal: measure in this process, bound to this many cores, and print a line of JSON."""


def main(config: BenchConfig) -> None:
    if config.worker:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.worker])
        print(json.dumps(measure(config)))
        return
    runs = []
    for threads in config.threads:
        options = ["--worker", str(threads), "--rounds", str(config.rounds), "--updates", str(config.updates)]
        options += ["--threads", *map(str, config.threads)]  # the largest also goes through ranks and pairs
        runs.append(measured_by("experiments.benchmarks.bench_optimizers", options))
        names = versions("jax", "jaxlib", "optax", "torch", "peft")
        print(table(write(config.out, "make bench-optimizers", versions=names, runs=runs)), flush=True)


def measure(config: BenchConfig) -> dict[str, Any]:
    """Returns everything that one process measures, in milliseconds an update."""
    import jax

    turns = (config.rounds, config.updates)
    separate = {name: ours(make, QWEN2_05B, 8, stacked=False) for name, make in contenders().items()}
    stacked = {name: ours(make, QWEN2_05B, 8, stacked=True) for name, make in contenders().items()}
    run: dict[str, Any] = {"threads": config.worker, "device": jax.devices()[0].device_kind}
    run["separate"] = medians(separate | torch_contenders(config.worker), *turns)
    run["stacked"] = medians(stacked, *turns)
    smol = medians({name: ours(make, SMOLLM2_135M, 8, stacked=True) for name, make in contenders().items()}, *turns)
    run["smollm2_135m"] = smol
    if config.worker == max(config.threads):
        by_rank = {r: {n: ours(make, QWEN2_05B, r, stacked=True) for n, make in contenders().items()} for r in RANKS}
        run["by_rank"] = {rank: medians(each, 5, 3) for rank, each in by_rank.items()}
        halves = {count: ((count // 2, 896, 896), (count // 2, 896, 128)) for count in PAIRS}
        by_pairs = {
            c: {n: ours(make, s, 8, stacked=True) for n, make in contenders().items()} for c, s in halves.items()
        }
        run["by_pairs"] = {count: medians(each, 5, 5) for count, each in by_pairs.items()}
    return run


def contenders() -> dict[str, Callable[[], Any]]:
    """Returns name -> a function that makes the transformation."""
    import optax

    from stable_lora_jax import lora_plus, lora_rite, riemannian_adamw, stable_lora, stable_lora_shrink

    def adamw() -> optax.GradientTransformation:
        return optax.adamw(1e-4)

    return {
        "AdamW": adamw,
        "Stable-LoRA": lambda: optax.chain(adamw(), stable_lora_shrink(1e-3)),
        "Stable-LoRA, wrapped": lambda: stable_lora(adamw(), 1e-3),
        "LoRA+": lambda: lora_plus(1e-4, 16.0, weight_decay=1e-4),
        "Riemannian": lambda: riemannian_adamw(1e-4, weight_decay=1e-4),
        "Riemannian, sequential": lambda: riemannian_adamw(1e-4, ordering="sequential", weight_decay=1e-4),
        "LoRA-RITE": lambda: lora_rite(1e-4),
    }


def ours(make: Callable[[], Any], shapes: tuple[tuple[int, int, int], ...], rank: int, stacked: bool) -> Iterator[None]:
    """Yields before and after every update of a fresh problem; the first takes the compilation."""
    import jax
    import jax.numpy as jnp
    import optax

    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for number, (count, n, m) in enumerate(shapes):
        sizes = {"lora_a": (n, rank), "lora_b": (rank, m)}
        groups = {f"{number}": (count,)} if stacked else {f"{number}.{i}": () for i in range(count)}
        for name, stack in groups.items():
            tree[name] = {
                side: jnp.asarray(rng.normal(size=(*stack, *s)) / 30, jnp.float32) for side, s in sizes.items()
            }
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 1e3, jnp.float32), tree)
    tx = make()
    state = jax.jit(tx.init)(tree)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(0, 1))
    while True:
        yield
        tree, state = step(tree, state, grads)
        jax.block_until_ready((tree, state))
        yield


def torch_contenders(threads: int) -> dict[str, Iterator[None]]:
    """Returns torch's AdamW and PEFT's optimizers on the same pairs; none without the torch extra."""
    try:
        import peft
        import peft.optimizers
        import torch
    except ModuleNotFoundError:
        return {}
    torch.set_num_threads(threads)

    def model() -> Any:
        layers = [torch.nn.Linear(n, m, bias=False) for count, n, m in QWEN2_05B for _ in range(count)]
        config = peft.LoraConfig(r=8, target_modules=[str(i) for i in range(len(layers))])
        adapted = peft.get_peft_model(torch.nn.Sequential(*layers), config)
        for p in adapted.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p) / 1e3
                torch.nn.init.normal_(p, std=1 / 30)
        return adapted

    def steps(make: Callable[[Any], Any]) -> Iterator[None]:
        adapted = model()
        optimizer = make(adapted)
        grads = [(p.grad, p.grad.clone()) for p in adapted.parameters() if p.requires_grad]
        while True:
            for grad, fresh in grads:  # PEFT's Riemannian scales them in place
                grad.copy_(fresh)
            yield
            optimizer.step()
            yield

    def trained(adapted: Any) -> list[Any]:
        return [p for p in adapted.parameters() if p.requires_grad]

    adamw = torch.optim.AdamW
    plus, riemannian = peft.optimizers.create_loraplus_optimizer, peft.optimizers.create_riemannian_optimizer
    return {
        "torch AdamW": steps(lambda adapted: adamw(trained(adapted), lr=1e-4)),
        "torch AdamW, fused": steps(lambda adapted: adamw(trained(adapted), lr=1e-4, fused=True)),
        "PEFT LoRA+": steps(lambda adapted: plus(adapted, adamw, lr=1e-4, loraplus_lr_ratio=16)),
        "PEFT Riemannian": steps(lambda adapted: riemannian(adapted, adamw, lr=1e-4)),
    }


def medians(contenders: dict[str, Iterator[None]], rounds: int, updates: int) -> dict[str, float]:
    """Returns the median milliseconds of an update of each contender, timed in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for each in contenders.values():
        for _ in range(4):
            next(each)
    for _ in range(rounds):
        for name, each in contenders.items():
            end = time.perf_counter() + LONGEST_TURN
            for _ in range(updates):
                next(each)
                start = time.perf_counter()
                next(each)
                seconds[name].append(time.perf_counter() - start)
                if start > end:
                    break
    return {name: round(1e3 * statistics.median(each), 4) for name, each in seconds.items()}


def step_milliseconds() -> float:
    """Returns the length of the shortest training step measured: SmolLM2-135M, base in bfloat16, batch 8, length 64."""
    cells = json.loads(TRAIN.read_text())["cells"]
    shortest = [cell["ours"] for cell in cells if (cell["dtype"], cell["length"]) == ("bfloat16", 64)]
    return 1e3 * min(ours["median_seconds"] for ours in shortest)


def share_of_step(update: dict[str, float], name: str) -> str:
    """Returns what a method's update of SmolLM2-135M's pairs takes beyond AdamW's, in percent of a training step."""
    share = round(100 * (update[name] - update["AdamW"]) / step_milliseconds(), 2)
    return f"{share:+.2f}%" if share else "0"


def short_table(result: dict[str, Any]) -> str:
    """Returns the README's table: one thread, beside the paper."""
    header = ("", "96 arrays, ms", "over AdamW", "4 stacks, ms", "over AdamW", "of a step", "in the paper")
    rows = []
    (run,) = (run for run in result["runs"] if run["threads"] == 1)
    separate, stacked, smol = run["separate"], run["stacked"], run["smollm2_135m"]
    for name, paper in PAPER.items():
        rows.append([name, *_over_adamw(separate, name), *_over_adamw(stacked, name), share_of_step(smol, name), paper])
    for name, each in separate.items():
        if "torch" in name or "PEFT" in name:
            rows.append([name, f"{each:.2f}", f"{each / separate['torch AdamW']:.2f} of torch's", *"----"])
    return markdown(header, rows)


def _over_adamw(each: dict[str, float], name: str) -> tuple[str, str]:
    """Returns a method's milliseconds, and how many times AdamW's they are."""
    return f"{each[name]:.2f}", f"{each[name] / each['AdamW']:.2f}"


def table(result: dict[str, Any]) -> str:
    """Returns everything measured."""
    lines = []
    for run in result["runs"]:
        lines.append(f"{run['threads']} threads, {run['device']}")
        header = ("update of", "ms", "over AdamW", "stacked, ms", "over AdamW", "of a training step")
        smol, rows = run["smollm2_135m"], []
        for name, each in run["separate"].items():
            base = run["separate"]["torch AdamW" if "torch" in name or "PEFT" in name else "AdamW"]
            rest = [*_over_adamw(run["stacked"], name), share_of_step(smol, name)] if name in smol else "---"
            rows.append([name, f"{each:.2f}", f"{each / base:.2f}", *rest])
        lines.append(markdown(header, rows))
        for sweep, unit in (("by_rank", "r = "), ("by_pairs", "pairs: ")):
            for size, each in run.get(sweep, {}).items():
                lines.append(f"{unit}{size}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in each.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
