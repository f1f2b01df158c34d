"""What is saved stays whole: failed saves are told, and what is not a checkpoint of this run is refused untouched."""

import contextlib
import gc
import re
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from stable_lora_jax.lora import inject_lora
from stable_lora_jax.training import (
    CheckpointError,
    TrainState,
    checkpoints,
    init_state,
    make_mesh,
    make_optimizer,
    newest_step,
    read_metrics,
    split_model,
)
from stable_lora_jax.training.sharding import replicated
from tests.models import tiny
from tests.training.test_loop import run
from tests.training.tiny_runs import VOCAB, adapted, trees_equal

# A write or read that fails outlives the event loop that Orbax started it in.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def nothing_outlives_its_test():
    yield
    gc.collect()


def fresh(method="stable-lora", model=None):
    optimizer = make_optimizer(method, 1e-2, lam=0.2, ratio=4.0, weight_decay=0.01, clip_norm=1.0)
    return init_state(split_model(model or adapted())[1], optimizer)


def at_step(state, step):
    """The same state, a number further on, so that every save differs."""
    return TrainState(jnp.asarray(step, jnp.int32), jax.tree.map(lambda x: x + step, state.adapters), state.opt_state)


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextlib.contextmanager
def full_disk(allowed=100):
    """No file may grow beyond so many bytes: writing more fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for_error(saved):
    """What `check`, asked again and again, raises when the save in the background has failed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            saved.check()
        except CheckpointError as error:
            return error
        time.sleep(0.01)
    return None


def saved_run(directory, *steps):
    with checkpoints(directory, 9) as saved:
        for step in steps:
            saved.save(at_step(fresh(), step))
    return snapshot(directory)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for keep_best, left in ((False, ["4", "5"]), (True, ["2", "4", "5"])):
        directory = tmp_path / str(keep_best)
        with checkpoints(directory, 2, keep_best) as saved:
            for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0], start=1):
                saved.save(at_step(fresh(), step), loss)
        assert sorted(path.name for path in directory.iterdir()) == left
    with checkpoints(directory, 2, True) as saved:
        assert trees_equal(saved.restore(fresh()), at_step(fresh(), 5))
    for newer in ("4", "5"):
        (directory / newer).rename(tmp_path / newer)
    with checkpoints(directory, 2, True) as saved:  # back to the best
        assert trees_equal(saved.restore(fresh()), at_step(fresh(), 2))


def test_a_checkpoint_is_the_same_on_every_mesh(tmp_path):
    with checkpoints(tmp_path, 2) as saved:
        saved.save(jax.device_put(at_step(fresh(), 3), replicated(make_mesh(2, 2, 2))))
        for sizes in ((8, 1, 1), (1, 2, 4), (1, 1, 1)):
            mesh = make_mesh(*sizes)
            restored = saved.restore(jax.device_put(fresh(), replicated(mesh)))
            assert trees_equal(restored, at_step(fresh(), 3))
            assert restored.step.sharding.device_set == set(mesh.devices.flat)


def test_a_failed_save_is_told_at_the_next_look(tmp_path):
    before = saved_run(tmp_path, 1)
    with full_disk(), checkpoints(tmp_path, 9) as saved:  # full until the end: what else is being written fails too
        saved.save(at_step(fresh(), 2))
        told = wait_for_error(saved)
    assert re.search(r"could not be written.*That of step 1 is whole.*--resume", str(told))
    assert newest_step(tmp_path) == 1
    with checkpoints(tmp_path, 9) as saved:
        assert trees_equal(saved.restore(fresh()), at_step(fresh(), 1))
    assert snapshot(tmp_path) == before  # the half-written one is gone


def test_a_full_disk_ends_a_run_and_leaves_its_newest_and_best_checkpoints(tmp_path):
    run(tmp_path, steps=6, save_every=1, keep=1, keep_best=True, norms_every=100)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    best = 1 + losses.index(min(losses))
    kept = {str(best), "6"}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == kept
    before = snapshot(tmp_path / "checkpoints")
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    with full_disk(largest - 1), pytest.raises(CheckpointError, match=r"That of step 6 is whole"):
        run(tmp_path, steps=40, resume=True, save_every=1, norms_every=100)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) < 40  # told soon, not at the end
    with checkpoints(tmp_path / "checkpoints", 1, keep_best=True) as saved:
        assert saved.latest_step() == 6
    assert snapshot(tmp_path / "checkpoints") == before


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "checkpoints", "/proc/checkpoints"):
        with pytest.raises(CheckpointError, match=r"cannot be kept in .*Choose a run directory that can be written to"):
            checkpoints(Path(place), 2).__enter__()
    assert (tmp_path / "file").read_text() == "precious"


def test_every_truncated_file_is_noticed_or_harmless(tmp_path):
    saved_run(tmp_path / "whole", 1, 2)
    damaged = tmp_path / "damaged"
    noticed = 0
    for file in sorted(path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()):
        shutil.copytree(tmp_path / "whole", damaged)
        part = damaged / file.relative_to(tmp_path / "whole")
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        before, told = snapshot(damaged), None
        with checkpoints(damaged, 9) as saved:
            try:
                assert trees_equal(saved.restore(fresh()), at_step(fresh(), 2)), part
            except ValueError as error:
                told = str(error)
        if told is not None:
            noticed += 1
            assert "2 is no whole checkpoint" in told
            assert "Move it away to resume from the one before" in told
        assert snapshot(damaged) == before
        shutil.rmtree(damaged / "2")
        with checkpoints(damaged, 9) as saved:
            assert trees_equal(saved.restore(fresh()), at_step(fresh(), 1))
        shutil.rmtree(damaged)
    assert noticed >= 3


def test_foreign_checkpoints_are_refused(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:  # which waits for the save
        checkpointer.save(tmp_path / "other" / "3" / "default", {"weights": jnp.ones(3)})
    (tmp_path / "empty" / "3").mkdir(parents=True)
    (tmp_path / "text" / "3").mkdir(parents=True)
    (tmp_path / "text" / "3" / "notes").write_text("not a checkpoint")
    for kind in ("other", "empty", "text"):
        before = snapshot(tmp_path / kind)
        with checkpoints(tmp_path / kind, 2) as saved, pytest.raises(ValueError, match=r"3 (is no|belongs to)"):
            saved.restore(fresh())
        assert snapshot(tmp_path / kind) == before


@pytest.mark.parametrize("kind", ["rank", "targets", "method", "base"])
def test_checkpoints_of_other_runs_are_refused(tmp_path, kind):
    before = saved_run(tmp_path, 3)
    changes = {"num_layers": 4} if kind == "base" else {}
    rank, targets = (4 if kind == "rank" else 2), ("qkvo" if kind == "targets" else "qv")
    model = inject_lora(tiny.decoder(vocab_size=VOCAB, **changes), rank, 4.0, targets, rngs=nnx.Rngs(1))
    other = fresh("lora-rite" if kind == "method" else "stable-lora", model)
    told = {
        "rank": r"q_proj.*: checkpoint float32\[3, 24, 2\], now float32\[3, 24, 4\]",
        "targets": r"o_proj.*: checkpoint nothing, now float32",
        "method": r"opt_state.*: checkpoint (nothing|float32|int32|bool)",
        "base": r"checkpoint float32\[3, 24, 2\], now float32\[4, 24, 2\]",
    }[kind]
    with checkpoints(tmp_path, 9) as saved, pytest.raises(ValueError, match=told) as error:
        saved.restore(other)
    assert "Resume with that run's own values" in str(error.value)
    assert snapshot(tmp_path) == before
