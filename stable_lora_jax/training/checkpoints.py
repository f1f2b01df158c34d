"""Checkpoints of a run, kept by Orbax: adapters, optimizer state (flags included) and step. Never the base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from stable_lora_jax.training.step import TrainState


class Checkpoints:
    """Saves and restores the state of a run.

    Args:
      directory: where checkpoints live, one folder a step.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, state: TrainState) -> None:
        """Saves in the background; an error of an earlier save is raised here."""
        self._manager.check_for_errors()
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)), force=True)

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest checkpoint, with the structure, dtypes and shardings of `like`.

        Raises:
          ValueError: there is none, or it does not have the structure of `like`.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(
                f"There is no checkpoint to resume from in {self._manager.directory}. Start again, replacing the "
                "run (--overwrite)."
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return TrainState(**restored)

    def close(self) -> None:
        """Waits for saves under way and raises their errors."""
        self._manager.wait_until_finished()
        self._manager.close()


@contextmanager
def checkpoints(directory: Path, keep: int) -> Iterator[Checkpoints]:
    """Opens a run's checkpoints, and finishes what is being saved on the way out."""
    manager = Checkpoints(directory, keep)
    try:
        yield manager
    finally:
        manager.close()


def _as_dict(state: TrainState) -> dict[str, object]:
    """Names the parts, so that a checkpoint can be read without this package."""
    return {"step": state.step, "adapters": state.adapters, "opt_state": state.opt_state}
