"""Checkpoints of a run, kept by Orbax: adapters, optimizer state (flags included) and step. Never the base model.

A folder named by a number is a whole checkpoint at all times: it is written under another name and renamed when it is
complete, and renamed again before it is deleted. So a process may be killed at any moment. A bucket has no renames:
there a checkpoint is whole once Orbax has put its mark into it, and what has no mark is deleted.
"""

import contextlib
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from stable_lora_jax.locations import Location, delete, is_url, location
from stable_lora_jax.training.distributed import LostProcessError, is_first
from stable_lora_jax.training.step import TrainState

_OUTDATED = "outdated"
_MARK = "commit_success.txt"  # what Orbax writes last, in a bucket


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names what is whole."""


class Checkpoints:
    """Saves and restores the state of a run.

    Args:
      directory: where checkpoints live, one folder per step; in a file system, or gs://BUCKET/...
      keep: how many of the newest to keep, >= 1.
      keep_best: keep the one of lowest loss too.

    Raises:
      ValueError: keep below 1.
      CheckpointError: the directory cannot be made or read.
    """

    def __init__(self, directory: Location, keep: int, keep_best: bool = False):
        if keep < 1:
            raise ValueError(f"keep={keep} is below 1. Keep at least the newest checkpoint.")
        self._directory, self._failed = location(directory if is_url(directory) else directory.absolute()), False
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
        if keep_best:
            best = preservation_policy.BestN(  # it keeps the highest
                get_metric_fn=lambda metrics: -metrics["loss"], n=1, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            todelete_subdir=_OUTDATED,
        )
        try:
            if is_first():
                self._directory.mkdir(parents=True, exist_ok=True)
            self._delete(f"*{ocp.utils.TMP_DIR_SUFFIX}*", _OUTDATED)
            self._delete_unfinished()
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
        except OSError as error:
            raise CheckpointError(
                f"Checkpoints cannot be kept in {self._directory}: {error}. Choose a run directory that can be written "
                "to."
            ) from error

    def save(self, state: TrainState, loss: float | None = None) -> None:
        """Saves in the background, after the save before has ended.

        Args:
          state: what to save; it may be donated as soon as this returns.
          loss: what "best" goes by.

        Raises:
          CheckpointError: this save could not begin, or the one before has failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with self._explained():
            self._manager.wait_until_finished()
            self._delete(_OUTDATED)
            metrics = None if loss is None else {"loss": loss}
            self._manager.save(step, metrics=metrics, args=ocp.args.StandardSave(_as_dict(state)), force=True)

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed; never waits."""
        if not self._manager.is_saving_in_progress():
            with self._explained():
                self._manager.wait_until_finished()  # has finished, and raises how

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None; one that is being saved counts."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint of lowest loss, None if none has one; waits for a save under way."""
        with self._explained():
            self._manager.wait_until_finished()
        return self._manager.best_step()

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Returns a checkpoint, with the structure, dtypes and shardings of `like`.

        Args:
          like: a state of the same model, adapters and optimizer.
          step: of the checkpoint; the newest if None.

        Raises:
          ValueError: there is none, it belongs to something else than `like` (what differs is named), or it is damaged.
          CheckpointError: a save under way has failed.
        """
        with self._explained():
            self._manager.wait_until_finished()
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(
                f"There is no checkpoint to resume from in {self._directory}. Start again, replacing the run "
                "(--overwrite)."
            )
        folder, target = self._directory / str(step), _as_dict(like)
        try:
            self._check_structure(folder, step, target)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except _OtherStructureError as error:
            raise ValueError(str(error)) from None
        except jax.errors.JaxRuntimeError:
            raise  # of the devices, which all processes meet on
        except Exception as error:  # whatever the many layers below make of a file that is not what they wrote
            raise ValueError(
                f"{folder} is no whole checkpoint of this program ({_first_line(error)}). Nothing was changed. Move it "
                "away to resume from the one before it, or put back a copy."
            ) from error
        return TrainState(**restored)

    def close(self) -> None:
        """Waits for saves under way and raises CheckpointError if one has failed, unless that was raised before."""
        if not self._failed:
            with self._explained():
                self._manager.wait_until_finished()
            self._delete(_OUTDATED)
        with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
            self._manager.close()

    def _check_structure(self, folder: Location, step: int, target: dict[str, object]) -> None:
        saved = self._manager.item_metadata(step)
        found, wanted = _leaves(saved.tree if hasattr(saved, "tree") else saved), _leaves(target)
        if found == wanted:
            return
        lines = [
            f"{name}: checkpoint {found.get(name, 'nothing')}, now {wanted.get(name, 'nothing')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        raise _OtherStructureError(
            f"{folder} belongs to a run of another rank, other targets, another method or model; {len(lines)} arrays "
            f"differ: {'; '.join(lines[:3])}{'; ...' if len(lines) > 3 else ''}. Resume with that run's own values, or "
            "choose another run directory."
        )

    def _delete(self, *patterns: str) -> None:
        for path in (path for pattern in patterns for path in self._directory.glob(pattern) if is_first()):
            # What cannot be deleted now (a save that failed may still be at work there) is no checkpoint either way.
            with contextlib.suppress(OSError):
                delete(path)

    def _delete_unfinished(self) -> None:
        """Deletes what a save that was killed left in a bucket."""
        if is_url(self._directory) and is_first():
            for path in self._directory.glob("[0-9]*"):
                if not _is_whole(path):
                    delete(path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # of the devices, which all processes meet on before a save
        except Exception as error:
            self._failed = True
            whole = newest_step(self._directory)
            # The only wait of a save is for the other processes; a disk that is full or read-only fails at once.
            lost = isinstance(error, TimeoutError)
            advice = "Start all processes again" if lost else "Make room there, or make it writable,"
            raise CheckpointError(
                f"A checkpoint could not be written to {self._directory} ({_first_line(error)}). "
                + ("None was whole before. " if whole is None else f"That of step {whole} is whole. ")
                + f"{advice} and resume from it (--resume)."
            ) from error


@contextlib.contextmanager
def checkpoints(directory: Location, keep: int, keep_best: bool = False) -> Iterator[Checkpoints]:
    """Opens a run's checkpoints, and finishes what is being saved on the way out."""
    manager = Checkpoints(directory, keep, keep_best)
    try:
        yield manager
    except (LostProcessError, KeyboardInterrupt):
        # A save that is shared with a lost process never ends; and one who interrupts does not want to wait for it.
        raise
    except BaseException as error:
        try:
            manager.close()
        except CheckpointError as another:
            error.add_note(str(another))
        raise
    else:
        manager.close()


def newest_step(directory: Location) -> int | None:
    """Returns the step of the newest whole checkpoint in a directory, or None; without opening anything."""
    found = (path for path in location(directory).glob("[0-9]*") if path.name.isdigit() and _is_whole(path))
    return max((int(path.name) for path in found), default=None)


def _is_whole(path: Location) -> bool:
    """Returns whether a folder named by a number is a whole checkpoint; in a file system it always is."""
    return not is_url(path) or (path / _MARK).exists()


class _OtherStructureError(ValueError):
    pass


def _as_dict(state: TrainState) -> dict[str, object]:
    """Names the parts, so that a checkpoint can be read without this package."""
    return {"step": state.step, "adapters": state.adapters, "opt_state": state.opt_state}


def _leaves(tree: object) -> dict[str, str]:
    """Returns dotted path -> shape and dtype."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(ocp.utils.get_key_name(key)) for key in path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in flat
    }


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
