"""Who may use a run directory, and what is deleted there."""

import json
import os
import subprocess
import sys

import pytest

from stable_lora_jax.training import RunDirectory

CONFIG, DATA = {"adapter": {"rank": 2}}, {"total_steps": 6, "examples_sha256": "ab"}
PLAIN = {"auto_resume": False, "overwrite": False}
AUTO, OVER = PLAIN | {"auto_resume": True}, PLAIN | {"overwrite": True}
RECORD = json.dumps({"config": CONFIG, **DATA})
PARTIAL = "config.json.partial"


def fill(directory, *names):
    """Writes these files, and the folders that end in a slash; config.json is the run's own."""
    for name in names:
        path = directory / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(RECORD if name == "config.json" else "mine")


def start(directory, asked, between=None):
    """Starts as the command does; `between` is what happens while the model is loaded."""
    run = RunDirectory(directory)
    seen = run.last_start()
    if run.resumes(CONFIG, DATA, resume=False, **asked):
        return True
    if between:
        between()
    run.prepare(CONFIG, DATA, seen, **asked)
    assert json.loads((directory / "config.json").read_text()).items() >= {"config": CONFIG, **DATA}.items()
    assert os.listdir(directory / "checkpoints") == []
    return False


@pytest.mark.parametrize(
    ("asked", "there", "kept"),
    [
        (PLAIN, [], []),
        (PLAIN, [PARTIAL], []),
        (OVER, ["config.json", "checkpoints/3/", "thesis.tex", "wandb/log", ".lock"], [".lock"]),
        (OVER, ["checkpoints/"], []),  # killed before config.json
        (AUTO, [], []),
        (AUTO, [PARTIAL, "checkpoints/"], []),
        (
            AUTO,
            [
                *("config.json", "metrics.jsonl", "metrics.jsonl.partial", "checkpoints/3.tmp/x", "tensorboard/events"),
                *("wandb/log", "wandb-id", "page.html", "norms.png"),
            ],
            ["norms.png", "page.html", "wandb", "wandb-id"],
        ),
    ],
)
def test_what_a_start_deletes(tmp_path, asked, there, kept):
    fill(tmp_path / "real", *there)
    (tmp_path / "real").mkdir(exist_ok=True)
    (tmp_path / "run").symlink_to("real")
    before = (tmp_path / "real").stat().st_ino
    assert not start(tmp_path / "run", asked)
    assert sorted(set(os.listdir(tmp_path / "run")) - {"config.json", "checkpoints"}) == kept
    assert (tmp_path / "real").stat().st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["real", "run"]


@pytest.mark.parametrize(
    ("asked", "there", "told"),
    [
        (PLAIN, ["thesis.tex"], "is not empty. Resume with --resume, replace it with --overwrite"),
        (PLAIN, ["checkpoints/"], "is not empty. Resume with --resume"),
        (
            OVER,
            ["thesis.tex", "figures/"],
            "contains 2 entries but no run: neither adapter",
        ),
        (OVER, ["config.json", "model.safetensors"], "entries but no run"),  # a model
        (OVER, ["checkpoints/3/", "thesis.tex"], "entries but no run"),  # another program's
        (AUTO, ["thesis.tex"], "not what a run leaves that had no checkpoint yet"),
        (AUTO, ["metrics.jsonl"], "not what a run leaves that had no checkpoint yet"),
        (AUTO, ["checkpoints/3/"], "not what a run leaves that had no checkpoint yet"),
        (AUTO, ["config.json", "metrics.jsonl", "adapter.safetensors"], "not what a run leaves"),  # it is finished
    ],
)
def test_what_a_start_refuses(tmp_path, asked, there, told):
    fill(tmp_path, *there)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=told):
        start(tmp_path, asked)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        *((asked, []) for asked in (PLAIN, OVER, AUTO)),
        *((asked, ["config.json", "checkpoints/"]) for asked in (OVER, AUTO)),
    ],
)
def test_of_two_starts_the_second_is_refused(tmp_path, asked, there):
    fill(tmp_path, *there)

    def another():
        start(tmp_path, asked)
        fill(tmp_path, "metrics.jsonl", "checkpoints/tmp/")

    with pytest.raises(ValueError, match=r"Another run has begun in .* since this one looked"):
        start(tmp_path, asked, another)
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "checkpoints" / "tmp").exists()


def test_one_of_two_that_start_at_once_makes_the_checkpoints(tmp_path, monkeypatch):
    """Both have looked; the other makes checkpoints/ between the last look and ours."""
    run = tmp_path / "run"
    monkeypatch.setattr(RunDirectory, "resumes", lambda *_, **__: fill(run, "checkpoints/"))
    with pytest.raises(ValueError, match="Another run has begun"):
        RunDirectory(run).prepare(CONFIG, DATA, (None, None), **PLAIN)
    assert os.listdir(run) == ["checkpoints"]


def test_a_process_is_alone_until_it_is_killed(tmp_path):
    run = tmp_path / "run"
    program = "import sys, pathlib\nfrom stable_lora_jax.training import RunDirectory\n"
    program += (
        "with RunDirectory(pathlib.Path(sys.argv[1])).exclusive_lock():\n    print('there', flush=True)\n    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        with (
            pytest.raises(ValueError, match=r"Another process trains in .*run right now"),
            RunDirectory(run).exclusive_lock(),
        ):
            pass
        other.kill()
    for _ in range(2):
        with RunDirectory(run).exclusive_lock():
            assert not start(run, PLAIN)  # what keeps others out counts as nothing there
            with pytest.raises(ValueError, match="right now"), RunDirectory(run).exclusive_lock():
                pass
        (run / "checkpoints").rmdir()
        (run / "config.json").unlink()


@pytest.mark.parametrize("asked", [AUTO, PLAIN | {"resume": True}])
@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"config": {"adapter": {"rank": 3}}, **DATA}, "with other values .adapter.rank: run 3, now 2."),
        ({"config": CONFIG, **DATA, "total_steps": 7}, "started on other data .total_steps: run 7, now 6."),
        ({"config": CONFIG, **DATA, "examples_sha256": "cd"}, "other data .examples_sha256: run 'cd', now 'ab'."),
        ({"config": CONFIG, "total_steps": 6}, "other data .examples_sha256: run None, now 'ab'."),
    ],
)
def test_a_run_goes_on_as_what_it_was(tmp_path, asked, record, told):
    fill(tmp_path, "config.json", "checkpoints/3/")
    asked = {"resume": False} | asked
    assert RunDirectory(tmp_path).resumes(CONFIG, DATA, **asked)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=told):
        RunDirectory(tmp_path).resumes(CONFIG, DATA, **asked)
