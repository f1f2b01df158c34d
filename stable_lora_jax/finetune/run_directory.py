"""The directory of a run: who may use it, and the config.json that says what ran there.

The directory itself is never deleted: it may be a link or a mount. A run owns it once it has made checkpoints/ there,
which only one of those that start at once can. config.json stays until the next one takes its place, so that a start
that is killed leaves what may be started over. While it is carried out, `exclusive_lock` keeps others out.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from stable_lora_jax.training import newest_step

CONFIG = "config.json"
ADAPTER = "adapter.safetensors"
CHECKPOINTS = "checkpoints"
_PARTIAL = ".config.json.partial"
_LOCK = ".lock"
# What counts as nothing there.
_NOTHING = {_PARTIAL, _LOCK}
# What a start writes itself, beside config.json: nothing worth keeping without a checkpoint.
_STARTED = {CHECKPOINTS, _PARTIAL, "metrics.jsonl", "metrics.jsonl.partial", "tensorboard"}


def check_directory(
    directory: Path,
    wanted: Mapping[str, object],
    data: Mapping[str, object],
    *,
    resume: bool,
    auto_resume: bool,
    overwrite: bool,
) -> bool:
    """Returns whether the run goes on; refuses to overwrite one unasked, or to resume something else.

    Args:
      directory: the run's.
      wanted: the configuration that decides what is computed.
      data: what stands beside the configuration in config.json and tells other data.
      resume: go on, or refuse.
      auto_resume: go on if there is a checkpoint, else start.
      overwrite: the run that is there may be replaced.

    Raises:
      ValueError: the directory is in use, holds nothing to resume, belongs to another configuration or other data, or
        would be overwritten and is no run's.
    """
    file = directory / CONFIG
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"The run directory {directory} is a file. Choose another --run-dir.")
    if resume and not file.exists():
        raise ValueError(f"There is no run to resume in {directory}. Start it without --resume.")
    if (resume or auto_resume) and file.exists():
        before = _record(file)
        if what := _differing(before["config"], wanted):
            raise ValueError(f"The run in {directory} was started with other values ({what}). Resume with its own.")
        if what := _differing(before, data):
            raise ValueError(
                f"The run in {directory} was started on other data ({what}). Resume with its own data and tokenizer, "
                "or choose another --run-dir."
            )
        if resume or newest_step(directory / CHECKPOINTS) is not None:
            return True
    left = {path.name for path in directory.iterdir()} - _NOTHING if directory.exists() else set()
    if overwrite and not _is_a_run(left):
        raise ValueError(
            f"The run directory {directory} contains {len(left)} entries but no run: neither {ADAPTER} nor both "
            f"{CONFIG} and {CHECKPOINTS}. --overwrite only replaces runs: empty it yourself, or choose "
            "another --run-dir."
        )
    if overwrite or not left or (auto_resume and _may_start_over(directory, left)):
        return False
    ways = "Replace it" if auto_resume else "Go on with --resume, replace it"
    why = "is not empty" + (", and not what a run leaves that had no checkpoint yet" if auto_resume else "")
    raise ValueError(f"The run directory {directory} {why}. {ways} with --overwrite, or choose another --run-dir.")


def _is_a_run(left: set[str]) -> bool:
    """Returns whether what is in a directory is a run, or what is left of one that was stopped while it started."""
    return ADAPTER in left or {CONFIG, CHECKPOINTS} <= left or left - {CONFIG} <= _STARTED


def _may_start_over(directory: Path, left: set[str]) -> bool:
    """Returns whether a run without a checkpoint was stopped early, by what it left (beside what others put there)."""
    if CONFIG in left:
        return ADAPTER not in left  # else it had come to its end
    return left == {CHECKPOINTS} and not any((directory / CHECKPOINTS).iterdir())


def _record(file: Path) -> dict[str, dict[str, object]]:
    """Returns a run's config.json."""
    try:
        record = dict(json.loads(file.read_text()))
        return record | {"config": dict(record["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold a run's configuration ({type(error).__name__}: {error}). Put back a copy, or start "
            "the run again with --overwrite."
        ) from error


def _differing(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    names = [name for name in now if before.get(name) != now[name]]
    return "; ".join(f"{name}: run {before.get(name)!r}, now {now[name]!r}" for name in names)


def last_start(directory: Path) -> tuple[int | None, ...]:
    """Returns what changes when a run begins in a directory."""
    marks = (directory / CONFIG, directory / CHECKPOINTS)
    return tuple(path.stat().st_mtime_ns if path.exists() else None for path in marks)


@contextlib.contextmanager
def exclusive_lock(directory: Path) -> Iterator[None]:
    """Makes a run's directory if need be, and keeps other processes out of it until the block or this process ends.

    Raises:
      ValueError: another process is in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / _LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"Another process trains in {directory} right now. Wait for its end, or choose another --run-dir."
        ) from None


def prepare_directory(
    directory: Path,
    config: Mapping[str, object],
    data: Mapping[str, object],
    seen: tuple[int | None, ...],
    *,
    auto_resume: bool,
    overwrite: bool,
) -> None:
    """Makes a new run's directory its own, and config.json, which is whole as soon as it is there.

    What is there is deleted with `overwrite`, and with `auto_resume` what a stopped start wrote; else nothing is.

    Args:
      directory, config, data, auto_resume, overwrite: as in `check_directory`.
      seen: `last_start`, from before `check_directory` was asked first.

    Raises:
      ValueError: another run has begun there since, or what `check_directory` refuses.
    """
    another = ValueError(
        f"Another run has begun in {directory} since this one looked. Choose another --run-dir, or wait for its end."
    )
    asked = {"resume": False, "auto_resume": auto_resume, "overwrite": overwrite}
    if last_start(directory) != seen or check_directory(directory, config, data, **asked):
        raise another
    directory.mkdir(parents=True, exist_ok=True)
    for path in list(directory.iterdir()):
        if path.name not in (CONFIG, _LOCK) and (overwrite or (auto_resume and path.name in _STARTED)):
            delete = shutil.rmtree if path.is_dir() and not path.is_symlink() else Path.unlink
            delete(path)
    try:
        (directory / CHECKPOINTS).mkdir()
    except FileExistsError:
        raise another from None
    versions = {name: version(name) for name in ("stable-lora-jax", "jax", "flax", "optax")}
    record = {"config": dict(config), **data, "versions": versions, "commit": commit()}
    partial = directory / _PARTIAL
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(directory / CONFIG)


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
