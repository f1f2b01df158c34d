"""Several processes on this machine, started by the real command line: one run, whatever their number."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from stable_lora_jax.training import RunDirectory, newest_step, read_metrics
from tests.cli.test_cli import code_of

STEPS, HEARTBEAT = 160, 10
LOW = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module")
def flags(model_dir, data_file):
    return [
        *("train", "--model", model_dir, "--data", data_file, "--rank", 2, "--learning-rate", "1e-3", "--lam", 0.01),
        *("--norms-every", 50, "--batch-size", 4, "--steps", STEPS, "--save-every", 5, "--keep", 1),
    ]


@contextlib.contextmanager
def processes(flags, count, *, devices):
    """Starts so many processes with so many devices each, and ends what is left of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "stable_lora_jax.cli", *map(str, flags)]
    command += ["--coordinator", address, "--processes", str(count), "--heartbeat-timeout", str(HEARTBEAT)]
    environment = os.environ | {"XLA_FLAGS": f"{LOW} --xla_force_host_platform_device_count={devices}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen([*command, "--process-id", str(i)], **pipes) for i in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}


def wait_for_step(run, step, started):
    deadline = time.monotonic() + 300
    while max(losses(run), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step} in time"
        for process in started:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_one_run_by_two_processes_then_four_then_one(flags, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert code_of([*flags, "--run-dir", whole]) == 0
    expected = losses(whole)

    # Two processes; one is killed, the other ends by itself, in time and with a reason.
    with processes([*flags, "--run-dir", run, "--mesh", "data=2,fsdp=2"], 2, devices=2) as started:
        wait_for_step(run, 21, started)  # the save of step 20 has begun, which waits for that of step 15
        started[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, error = started[0].communicate(timeout=60)
        assert time.monotonic() - killed < 3 * HEARTBEAT
        if started[0].returncode == -signal.SIGABRT:  # it was waiting for a save shared with the dead, and JAX ends it
            assert "another task died" in error
        else:
            assert started[0].returncode == 1, error
            assert "Process 0 of 2 cannot continue" in error
            assert "Start all of them again" in error
    by_two, kept = losses(run), newest_step(run / "checkpoints")
    assert kept is not None
    assert kept >= 15

    # Four resume from the newest checkpoint; a signal to one stops all after the same step.
    with processes([*flags, "--run-dir", run, "--mesh", "data=4", "--auto-resume"], 4, devices=1) as started:
        wait_for_step(run, max(by_two) + 20, started)
        started[2].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=60) for process in started]
        assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 4, told
    (stopped,) = map(int, re.findall(r"Stopped by SIGTERM at step (\d+) of 160; --resume", told[0][0]))
    assert not any("Stopped" in out or "train:" in error for out, error in told[1:])  # process 0 alone tells
    assert newest_step(run / "checkpoints") == stopped == max(losses(run))
    by_four = losses(run)
    assert {step: by_four[step] for step in range(1, kept + 1)} == {step: by_two[step] for step in range(1, kept + 1)}

    # One process finishes, once no other is there.
    with RunDirectory(run).exclusive_lock():
        assert code_of([*flags, "--run-dir", run, "--resume"]) == 2
    assert "Another process trains in" in capsys.readouterr().err
    assert code_of([*flags, "--run-dir", run, "--resume"]) == 0
    assert f"Trained {STEPS} steps" in capsys.readouterr().out
    found = losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    first = range(1, 11)
    np.testing.assert_allclose([by_two[s] for s in first], [expected[s] for s in first], rtol=1e-5)
    np.testing.assert_allclose([found[s] for s in found], [expected[s] for s in found], rtol=1e-3)  # Adam amplifies


def test_two_processes_validate_as_one_does(flags, tmp_path):
    validated = [*flags, "--steps", 9, "--holdout", 4, "--eval-every", 3, "--keep-best"]
    assert code_of([*validated, "--run-dir", tmp_path / "one"]) == 0
    with processes([*validated, "--run-dir", tmp_path / "two", "--mesh", "data=2,fsdp=2"], 2, devices=2) as started:
        told = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0, 0], told
    one, two = (
        [line["validation"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "validation" in line]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    np.testing.assert_allclose([each["loss"] for each in two], [each["loss"] for each in one], rtol=1e-3)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--processes", "2"], ["processes=2", "only some", "all three"]),
        (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process-id", "2"], ["process_id=2", "[0, processes)"]),
        (["--coordinator", "127.0.0.1", "--processes", "1", "--process-id", "0"], ["host:port"]),
        (["--distributed", "--heartbeat-timeout", "0"], ["heartbeat_timeout=0"]),
        (["--resume", "--overwrite"], ["--resume", "--auto-resume", "exclude"]),
        (["--keep", "0"], ["keep=0"]),
    ],
)
def test_bad_values_are_refused(flags, tmp_path, capsys, extra, told):
    assert code_of([*flags, "--run-dir", tmp_path / "run", *extra]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for word in told:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_no_cluster_is_an_error(flags, tmp_path):
    command = [sys.executable, "-m", "stable_lora_jax.cli", *map(str, flags), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--distributed"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "No Cloud TPU, SLURM, Open MPI or Kubernetes job is found here" in done.stderr
    assert not (tmp_path / "run").exists()
