"""Runs in a bucket: the real commands, each a process, against a server that speaks Google Cloud Storage's protocol.

The server keeps everything in memory. Orbax reaches it by tensorstore's client, everything else by gcsfs.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stable_lora_jax.finetune import ExecutionConfig, RunConfig
from stable_lora_jax.locations import is_url, location
from stable_lora_jax.training import LostRunError, RunDirectory, newest_step
from tests.cli.storage_server import storage_server

STEPS = 40
RUN = [sys.executable, "-m", "stable_lora_jax.cli"]
LOW = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module")
def bucket():
    """Yields the name of a bucket that this process and those it starts reach."""
    with storage_server("runs") as address, pytest.MonkeyPatch.context() as patched:
        patched.setenv("STORAGE_EMULATOR_HOST", address)
        patched.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patched.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask for credentials
        patched.setenv("XLA_FLAGS", LOW)
        yield "runs"


@pytest.fixture
def flags(model_dir, data_file):
    flags = ["--model", model_dir, "--data", data_file, "--rank", 2, "--learning-rate", "1e-3", "--lam", 0.01]
    return [*map(str, flags), "--norms-every", "10", "--batch-size", "4", "--steps", str(STEPS), "--save-every", "5"]


def command(*arguments, code=0):
    done = subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def without_times(lines):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_a_killed_run_resumes_to_the_same_adapter_as_one_in_a_folder(bucket, flags, tmp_path):
    command("train", *flags, "--run-dir", tmp_path / "run")
    expected = RunDirectory(tmp_path / "run")

    run = f"gs://{bucket}/a/run"
    there = RunDirectory(Path(run))
    started = subprocess.Popen([*RUN, "train", *flags, "--run-dir", run, "--auto-resume"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while (there.newest_step() or 0) < 10:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert not there.is_finished

    assert "was stopped" in command("eval", "--adapter", run, "--data", flags[3], code=2)
    command("train", *flags, "--run-dir", run, "--auto-resume")
    assert there.is_finished
    assert there.adapter.read_bytes() == expected.adapter.read_bytes()
    assert without_times(there.metrics()) == without_times(expected.metrics())
    assert there.newest_step() == newest_step(expected.checkpoints) == STEPS

    assert "is not empty" in command("train", *flags, "--run-dir", run, code=2)
    assert f"step {STEPS}/{STEPS}" in command("watch", run, "--once")
    of_both = [command("eval", "--adapter", each, "--data", flags[3]) for each in (run, tmp_path / "run")]
    assert of_both[0] == of_both[1] != ""
    command("export-plots", run)
    assert (location(run) / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("**/gs:*"))


def test_the_process_that_resumes_last_owns_the_run(bucket, flags):
    run = f"gs://{bucket}/b/run"
    long = [*flags[:-3], "100000", "--save-every", "20"]
    first = subprocess.Popen([*RUN, "train", *long, "--run-dir", run], stderr=subprocess.PIPE, text=True)
    there, deadline = RunDirectory(Path(run)), time.monotonic() + 200
    while (there.newest_step() or 0) < 20:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = subprocess.Popen([*RUN, "train", *long, "--run-dir", run, "--resume"], stderr=subprocess.PIPE, text=True)
    _, error = first.communicate(timeout=200)
    assert first.returncode == 2
    assert f"Another process has resumed or replaced the run in {run}" in error
    second.kill()
    second.communicate()
    with pytest.raises(LostRunError, match="resumed or replaced"):
        there.check_owner()


def test_what_another_process_writes_is_seen(bucket):
    run = RunDirectory(Path(f"gs://{bucket}/c"))

    def elsewhere(code):
        start = f"from etils import epath; p = epath.Path('gs://{bucket}/c')\n"
        subprocess.run([sys.executable, "-c", start + code], check=True, timeout=100)

    elsewhere("(p / 'config.json').write_text('{\"config\": {}}')")
    assert (run.is_started, run.is_finished, run.metrics(), run.newest_step()) == (True, False, [], None)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    elsewhere(
        "(p / 'metrics.jsonl').write_text('{\"step\": 1}'); (p / 'adapter.safetensors').write_text('x');"
        "(p / 'checkpoints/5/commit_success.txt').write_text('x'); (p / 'checkpoints/7/cut_short').write_text('x')"
    )
    assert (run.is_started, run.is_finished, run.metrics(), run.newest_step()) == (False, True, [{"step": 1}], 5)


def test_what_is_no_place_for_a_run_is_refused():
    with pytest.raises(ValueError, match=r"s3:/bucket/run is a URL that nothing here reads"):
        RunConfig(run=ExecutionConfig(run_dir=Path("s3://bucket/run")))
    with pytest.raises(ValueError, match="log='tensorboard' writes to a folder"):
        RunConfig(run=ExecutionConfig(run_dir=Path("gs://bucket/run"), log=("tensorboard",)))
    assert "out=gs:/bucket/x is a URL" in command("export", "runs/some", "gs://bucket/x", code=2)
    assert is_url(Path("gs://bucket/x"))
    assert not is_url(Path("runs/gs:x"))
    assert os.fspath(location(Path("gs://bucket/x/y"))) == "gs://bucket/x/y"
