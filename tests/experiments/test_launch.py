"""The launch files parse, and all run one command, whose options exist."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_run_the_one_command(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    own = {"train.sh", "slurm_array.sh", "paper.sh"}
    assert path.name in own or "bash experiments/launch/train.sh" in path.read_text()


def test_the_jobset_runs_the_one_command_on_every_host():
    job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "experiments/launch/train.sh"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert f"fsdp={rows * columns}" in container["args"]
    assert chips == rows * columns
    assert job["parallelism"] == job["completions"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def recorded(tmp_path, name, script, *arguments, **environment):
    """What a script asks a launcher for, with a program in the launcher's place that writes down its arguments."""
    program = tmp_path / name
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\nexit "${{CODE:-0}}"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", LAUNCH / script, *arguments], env=os.environ | {"PATH": path} | environment)
    return done.returncode, (tmp_path / f"{name}.txt").read_text().splitlines()


ARGUMENTS = ["--data", "a file.jsonl", "--mesh", "data=2,fsdp=8"]


@pytest.mark.parametrize(
    ("script", "launcher", "own"),
    [("tpu_vm.sh", "gcloud", ["NAME", "ZONE"]), ("gke_xpk.sh", "xpk", ["CLUSTER", "v5litepod-16", "IMAGE"])],
)
def test_arguments_arrive_as_given(tmp_path, script, launcher, own):
    code, told = recorded(tmp_path, launcher, script, *own, *ARGUMENTS)
    assert code == 0
    assert set(own) <= set(told)
    (command,) = [line for line in told if "train.sh" in line]
    assert shlex.split(command)[-len(ARGUMENTS) :] == ARGUMENTS


TRAIN = ["--kill-on-bad-exit=1", "bash", "experiments/launch/train.sh", *ARGUMENTS]
CELLS = ["python", "-m", "experiments.studies.qa", "--part", "3/8", "--tasks", "a file.jsonl"]


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [("slurm.sh", ARGUMENTS, TRAIN), ("slurm_array.sh", ["qa", "--tasks", "a file.jsonl"], CELLS)],
)
@pytest.mark.parametrize("code", [0, 1, 143])
def test_slurm_queues_again_after_a_stop_only(tmp_path, script, arguments, command, code):
    (tmp_path / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" > {tmp_path}/queued\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = {"SLURM_SUBMIT_DIR": str(LAUNCH.parents[1]), "SLURM_JOB_ID": "7", "CODE": str(code)}
    environment |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    ended, told = recorded(tmp_path, "srun", script, *arguments, **environment)
    assert ended == code
    assert told == command
    assert (tmp_path / "queued").exists() == (code == 143)


def test_an_array_job_runs_its_part(tmp_path):
    """The command that the script hands to srun, run without a cluster: the ninth part of no cells."""
    (tmp_path / "srun").write_text(f'#!/usr/bin/env bash\nshift\nexec {sys.executable} "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {
        "SLURM_SUBMIT_DIR": str(LAUNCH.parents[1]),
        "SLURM_ARRAY_TASK_ID": "9",
        "SLURM_ARRAY_TASK_COUNT": "9",
    }
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ["ablation", "--seeds", "0", "--results", tmp_path / "results"]
    command = ["bash", LAUNCH / "slurm_array.sh", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ablation: 0 cells, 0 to run here" in done.stdout
    help_text = subprocess.run(["bash", LAUNCH / "slurm_array.sh"], capture_output=True, text=True)
    assert help_text.returncode == 2
    assert "usage" in help_text.stderr


def test_the_papers_ranges_are_understood(tmp_path):
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "paper.sh", "Qwen/Qwen2-0.5B", "--part", "9/8", "--results", tmp_path / "results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=LAUNCH.parents[1])
    assert done.returncode == 1
    assert "part='9/8' is not understood" in done.stderr  # all else was accepted


def test_the_one_command_is_understood(tmp_path):
    (tmp_path / "stable-lora").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m stable_lora_jax.cli "$@"\n')
    (tmp_path / "stable-lora").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "train.sh", "--data", "arc_easy", "--run-dir", tmp_path / "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=LAUNCH.parents[1])
    assert done.returncode == 2
    assert "No Cloud TPU, SLURM, Open MPI or Kubernetes job is found here" in done.stderr  # all else was accepted
