"""Signals to the real command, as a process of its own, at every moment of its life."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stable_lora_jax.training import newest_step, read_metrics
from tests.cli.test_cli import code_of, last_step


@pytest.fixture(scope="module")
def train_flags(model_dir, data_file):
    return [
        *("train", "--model", model_dir, "--data", data_file, "--rank", 2, "--learning-rate", "1e-2"),
        *("--lam", 0.1, "--norms-every", 2, "--batch-size", 4),
    ]


def start(flags, *before):
    command = [*before, sys.executable, "-m", "stable_lora_jax.cli", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(metrics, step, child):
    deadline = time.monotonic() + 120
    while last_step(metrics) < step and child.poll() is None:
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.005)


def wait_for_first_line(child):
    """Waits until the command's own code runs: Python itself leaves SIGTERM to the system, the command does not."""
    deadline, status = time.monotonic() + 60, Path(f"/proc/{child.pid}/status")
    while not int(re.findall(r"^SigCgt:\s*(\w+)", status.read_text(), re.M)[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert child.poll() is None
        assert time.monotonic() < deadline, "no line of the command in time"
        time.sleep(0.002)


@pytest.mark.parametrize("after", [0, 0.5, 1, 2, 4])
def test_an_early_interrupt_ends_at_once_with_one_line(train_flags, tmp_path, after):
    run = tmp_path / "run"
    with start([*train_flags, "--steps", 100_000, "--run-dir", run]) as child:
        wait_for_first_line(child)
        time.sleep(after)
        reached = last_step(run / "metrics.jsonl")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "stable-lora:" in line]
    assert lines == ["stable-lora: ended by SIGINT"] or (reached and "Stopped by SIGINT at step" in out)
    assert not (run / "adapter.safetensors").exists()
    # Nothing half-written is in the way.
    assert (
        code_of([*train_flags, "--steps", 2, "--run-dir", run, "--auto-resume" if not reached else "--overwrite"]) == 0
    )


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.2])
def test_a_second_interrupt_ends_at_once_while_a_checkpoint_is_written(train_flags, tmp_path, pause):
    run = tmp_path / "run"
    flags = [*train_flags, "--steps", 2000, "--save-every", 1, "--run-dir", run]
    with start(flags) as child:
        wait_for_step(run / "metrics.jsonl", 5, child)
        child.send_signal(signal.SIGINT)
        time.sleep(pause)
        child.send_signal(signal.SIGINT)
        second = time.monotonic()
        _, err = child.communicate(timeout=60)
        assert time.monotonic() - second < 10
    assert child.returncode == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    kept = newest_step(run / "checkpoints")
    assert kept is not None
    assert code_of([*train_flags, "--steps", 2000, "--run-dir", run, "--overwrite", "--steps", kept + 1]) == 0


def test_a_signal_that_is_ignored_stays_ignored(train_flags, tmp_path):
    flags = [*train_flags, "--steps", 60, "--run-dir", tmp_path / "run"]
    with start(flags, "nohup") as child:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 2, child)
        child.send_signal(signal.SIGHUP)
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert "Trained 60 steps" in out


@pytest.fixture(autouse=True)
def unignored():
    """Lets signals end processes: nohup ignores SIGHUP, a shell's & SIGINT, and what is ignored stays so in a child."""
    kinds = [kind for kind in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(kind) is signal.SIG_IGN]
    for kind in kinds:
        signal.signal(kind, signal.SIG_DFL)
    yield
    for kind in kinds:
        signal.signal(kind, signal.SIG_IGN)


def test_signals_stop_cleanly_and_resume_is_exact(train_flags, tmp_path):
    flags = [*train_flags, "--steps", 120, "--dropout", 0.1]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert code_of([*flags, "--run-dir", whole]) == 0
    metrics, last, resume = run / "metrics.jsonl", 0, []
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        command = [sys.executable, "-m", "stable_lora_jax.cli", *map(str, flags), "--run-dir", str(run), *resume]
        deadline = time.monotonic() + 120
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            while last_step(metrics) < last + 2 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            assert time.monotonic() < deadline, "no step in time"
            child.send_signal(kind)
            out, err = child.communicate(timeout=120)
        assert child.returncode == 128 + kind, err
        assert last < last_step(metrics) < 120
        last, resume = last_step(metrics), ["--resume"]
        assert f"Stopped by {kind.name} at step {last} of 120; --resume" in out
        assert str(last) in {path.name for path in (run / "checkpoints").iterdir()}
        assert not (run / "adapter.safetensors").exists()
    assert code_of([*flags, "--run-dir", run, "--resume"]) == 0
    assert (run / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    losses = [[(x["step"], x["loss"]) for x in read_metrics(r / "metrics.jsonl") if "loss" in x] for r in (run, whole)]
    assert losses[0] == losses[1]
