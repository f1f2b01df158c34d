"""Kill test: a training that is killed again and again ends with the same bits as one that is left alone.

Question:  does a run survive SIGKILL at any moment, also in the middle of a save: is every numbered
           folder a whole checkpoint, does the next start go on from the newest, and are state and losses those of an
           undisturbed run, bit by bit? Does SIGTERM save first?
Command:   python -m experiments.benchmarks.kill_test
Hardware:  2 CPU cores. Minutes: 18 beside much other work.
Expected:  (2026-11-22) no difference in any bit.
Observed:  none in 118 kills.

The program under test is `training.train` in a process of its own: a small decoder with dropout, Stable-LoRA, a
checkpoint after every step. The judge reads checkpoints with Orbax alone, not with this package.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.running.provenance import commit, machine, versions


@dataclass(frozen=True, kw_only=True)
class KillConfig:
    """Kill trainings at random moments, compare with one left alone, and write a JSON file."""

    kills: int = 100
    """SIGKILLs in all."""
    steps: int = 40
    """Steps of a training."""
    seed: int = 0
    """Of the moments."""
    out: Path = Path("experiments/results/kill_test.json")
    """The file to write."""


def main(config: KillConfig) -> None:
    with tempfile.TemporaryDirectory() as directory:
        result = {"command": " ".join(["python -m experiments.benchmarks.kill_test", *sys.argv[1:]])} | run(
            config, Path(directory)
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(config: KillConfig, directory: Path) -> dict[str, Any]:
    """Returns the record of the whole test.

    Raises:
      RuntimeError: a bit, a step or a folder is not what it should be.
    """
    rng, start = random.Random(config.seed), time.monotonic()
    judge = Judge(directory / "alone", config.steps)
    counts, number = Counter[str](), 0
    while counts["sigkill"] < config.kills:
        number += 1
        disturbed(directory / f"run{number}", config, rng, judge, counts)
        shutil.rmtree(directory / f"run{number}")
        print(f"{number} trainings, {dict(counts)}", flush=True)
    return {
        "trainings": number,
        "steps_each": config.steps,
        **counts,
        "megabits_compared": round(judge.bits / 1e6, 2),
        "differing_bits": 0,  # else an error was raised
        "seconds": round(time.monotonic() - start),
        "commit": commit(),
        "machine": machine(),
        "versions": versions("jax", "flax", "optax", "orbax-checkpoint"),
    }


def disturbed(run_dir: Path, config: KillConfig, rng: random.Random, judge: "Judge", counts: Counter[str]) -> None:
    """Starts a training, and again after each kill, until it ends; checks what it leaves every time."""
    checkpoints = run_dir / "checkpoints"
    while True:
        found, lines, newest = unfinished(checkpoints), metrics_lines(run_dir), judge.newest(checkpoints)
        process = start(run_dir, config.steps)
        kind = signal.SIGTERM if rng.random() < 0.1 else signal.SIGKILL
        if kind is signal.SIGKILL and rng.random() < 0.1:
            moment = "while starting"
            time.sleep(rng.uniform(0, 2))
        else:
            moment = "while training"
            wait_for_new_step(process, run_dir, lines)
            time.sleep(rng.uniform(0, 1))
        ended = not process.is_alive()
        process.kill() if kind is signal.SIGKILL else process.terminate()
        process.join()
        counts["resumes_from_the_newest"] += judge.check_resume(run_dir, lines, newest)
        match process.exitcode:
            case 0:
                break
            case -9 if not ended:
                counts["sigkill"] += 1
                counts[f"sigkill {moment}"] += 1
                counts["sigkill in the middle of a save"] += bool(unfinished(checkpoints) - found)
            case 143:  # 128 + SIGTERM: stopped in the loop
                counts["sigterm_and_saved"] += judge.check_saved(run_dir)
            case -15:
                counts["sigterm outside of the loop"] += 1
            case code:
                raise RuntimeError(f"The training ended with {code}.")
        counts["whole_checkpoints_read"] += judge.check_checkpoints(checkpoints)
    if unfinished(checkpoints) or (checkpoints / "outdated").exists():
        raise RuntimeError(f"Unfinished folders are left: {sorted(path.name for path in checkpoints.iterdir())}.")
    counts["whole_checkpoints_read"] += judge.check_checkpoints(checkpoints)
    judge.check_end(run_dir)


class Judge:
    """Holds an undisturbed run with a checkpoint of every step, and compares others with it."""

    def __init__(self, alone: Path, steps: int):
        process = start(alone, steps, keep=steps)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"The undisturbed training ended with {process.exitcode}.")
        self._alone, self._steps, self.bits = alone, steps, 0

    def newest(self, checkpoints: Path) -> int:
        """Returns the highest number among the folders, 0 if there are none."""
        return max(numbered(checkpoints), default=0)

    def check_checkpoints(self, checkpoints: Path) -> int:
        """Compares every numbered folder with the undisturbed run's of that step; returns how many there are."""
        for step in numbered(checkpoints):
            ours, theirs = (read_arrays(path / str(step)) for path in (checkpoints, self._alone / "checkpoints"))
            if ours.keys() != theirs.keys():
                raise RuntimeError(f"The checkpoint of step {step} has other arrays: {ours.keys() ^ theirs.keys()}.")
            for name, array in ours.items():
                if array.dtype != theirs[name].dtype or array.tobytes() != theirs[name].tobytes():
                    raise RuntimeError(f"{name} differs at step {step}.")
                self.bits += 8 * array.nbytes
        return len(numbered(checkpoints))

    def check_resume(self, run_dir: Path, before: list[str], newest: int) -> bool:
        """Returns whether the run wrote a step; raises unless the first followed the newest checkpoint."""
        steps = new_steps(before, metrics_lines(run_dir))
        if steps and steps[0] != newest + 1:
            raise RuntimeError(f"The newest checkpoint was that of step {newest}, the next step {steps[0]}.")
        return bool(steps and newest)

    def check_saved(self, run_dir: Path) -> int:
        """Returns 1; raises unless the last step of the metrics has a checkpoint."""
        last = losses(run_dir)[-1][0]
        if self.newest(run_dir / "checkpoints") != last:
            raise RuntimeError(f"SIGTERM after step {last} left the checkpoints {numbered(run_dir / 'checkpoints')}.")
        return 1

    def check_end(self, run_dir: Path) -> None:
        """Raises unless the run came to its end with the losses of the undisturbed one."""
        if self.newest(run_dir / "checkpoints") != self._steps or losses(run_dir) != losses(self._alone):
            raise RuntimeError(f"The run ended at {numbered(run_dir / 'checkpoints')} with other losses.")


def start(run_dir: Path, steps: int, keep: int = 2) -> BaseProcess:
    """Starts, or goes on with, a training in a process of its own, which finds its imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grain", "stable_lora_jax.training"])
    # The compiler optimises little, and what it made is found again: starts are what takes the time here.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = context.Process(target=work, args=(run_dir, steps, keep))
    process.start()
    return process


def wait_for_new_step(process: BaseProcess, run_dir: Path, before: list[str]) -> None:
    while process.is_alive() and not new_steps(before, metrics_lines(run_dir)):
        time.sleep(0.002)


def numbered(checkpoints: Path) -> list[int]:
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_ino) for path in checkpoints.glob("*tmp*")}


def metrics_lines(run_dir: Path) -> list[str]:
    file = run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def new_steps(before: list[str], now: list[str]) -> list[int]:
    """Returns the steps whose losses stand after the lines that did not change (the speed in a line tells)."""
    same = next((i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), len(before))
    return [json.loads(line)["step"] for line in now[same:] if '"loss"' in line and line.endswith("}")]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in metrics_lines(run_dir) if '"loss"' in line]
    return [(line["step"], line["loss"]) for line in lines]


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided")  # there is one device
        tree = ocp.PyTreeCheckpointer().restore(folder / "default")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def work(run_dir: Path, steps: int, keep: int) -> None:
    """Trains as `stable-lora train --auto-resume` does, and exits with its code."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from stable_lora_jax.data import Encoded, TrainBatches
    from stable_lora_jax.lora import inject_lora
    from stable_lora_jax.models import Decoder, DecoderConfig
    from stable_lora_jax.training import make_loss, make_optimizer, newest_step, train

    jax.config.update("jax_compilation_cache_dir", str(run_dir.parent / "programs"))
    shape = DecoderConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        max_positions=64,
    )
    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for _, param in nnx.to_flat_state(nnx.state(model)):
        param.set_value(jnp.asarray(rng.normal(0, 0.2, param.shape), jnp.float32))
    inject_lora(model, 4, 8.0, "qv", rngs=nnx.Rngs(0), dropout=0.1)
    examples = [Encoded(tuple(row[:9]), (tuple(row[9:]),), 0) for row in rng.integers(1, 60, (64, 12)).tolist()]
    run_dir.mkdir(exist_ok=True)
    result = train(
        *(model, TrainBatches(examples, batch_size=8, seed=0, max_length=64)),
        make_optimizer("stable-lora", 1e-2, lam=0.05, ratio=1.0, weight_decay=0.01, clip_norm=1.0),
        loss=make_loss("answer", 1),
        total_steps=steps,
        learning_rate=lambda step: 1e-2,
        run_dir=run_dir,
        save_every=1,
        keep=keep,
        resume=newest_step(run_dir / "checkpoints") is not None,
        progress=False,
    )
    sys.exit(128 + result.stopped_by if result.stopped_by else 0)


if __name__ == "__main__":
    main(tyro.cli(KillConfig))
