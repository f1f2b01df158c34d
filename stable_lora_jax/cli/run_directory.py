"""The directory of a run: who may use it, and the config.json that says what ran there."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from stable_lora_jax.training import newest_step

# What a run leaves that was stopped before its first checkpoint: nothing worth keeping.
_LEFT_WITHOUT_CHECKPOINT = {"config.json", "metrics.jsonl", "metrics.jsonl.partial", "checkpoints"}


def check_directory(
    directory: Path, wanted: Mapping[str, object], *, resume: bool, auto_resume: bool, overwrite: bool
) -> bool:
    """Returns whether the run goes on; refuses to overwrite one unasked, or to resume something else.

    Args:
      directory: the run's.
      wanted: the configuration that decides what is computed.
      resume: go on, or refuse.
      auto_resume: go on if there is a checkpoint, else start.
      overwrite: what is there may be replaced.

    Raises:
      ValueError: the directory is in use, holds nothing to resume, or belongs to another configuration.
    """
    file = directory / "config.json"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"The run directory {directory} is a file. Choose another --run-dir.")
    begun = newest_step(directory / "checkpoints") is not None
    goes_on = resume or (auto_resume and begun)
    if resume and not file.exists():
        raise ValueError(f"There is no run to resume in {directory}. Start it without --resume.")
    if (resume or auto_resume) and file.exists():
        before = _started_with(file)
        if differing := [name for name in wanted if before.get(name) != wanted[name]]:
            what = "; ".join(f"{name}: run {before.get(name)!r}, now {wanted[name]!r}" for name in differing)
            raise ValueError(f"The run in {directory} was started with other values ({what}). Resume with its own.")
    if goes_on:
        return True
    left = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if auto_resume:
        left -= _LEFT_WITHOUT_CHECKPOINT
    if left and not overwrite:
        raise ValueError(
            f"The run directory {directory} is not empty. Go on with --resume, replace it with --overwrite, or "
            "choose another --run-dir."
        )
    return False


def _started_with(file: Path) -> dict[str, object]:
    """Returns the configuration in a run's config.json."""
    try:
        return dict(json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold a run's configuration ({type(error).__name__}: {error}). Put back a copy, or start "
            "the run again with --overwrite."
        ) from error


def prepare_directory(directory: Path, config: Mapping[str, object], total_steps: int) -> None:
    """Makes a new run's directory and config.json, which is whole as soon as it is there; deletes what was there."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    versions = {name: version(name) for name in ("stable-lora-jax", "jax", "flax", "optax")}
    record = {"config": dict(config), "total_steps": total_steps, "versions": versions, "commit": commit()}
    partial = directory.with_name(directory.name + ".config.partial")  # beside it: an empty directory is a free one
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(directory / "config.json")


def commit() -> str | None:
    """Returns the git commit of this package's checkout, with "+" if files differ from it; None outside of one."""
    where = ["git", "-C", str(Path(__file__).parent)]
    try:
        # Installed into somebody else's repository, this file is not one of its own.
        subprocess.run([*where, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*where, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*where, "diff", "--quiet", "HEAD", "--", ".."], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")
