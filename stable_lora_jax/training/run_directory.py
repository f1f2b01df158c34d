"""The directory of a run: every file in it, who may use it, and what it says of what ran there.

| entry | holds |
|---|---|
| config.json | the configuration, steps in all, a checksum of the data, versions, commit |
| metrics.jsonl | see `training.metrics` |
| checkpoints/ | see `training.checkpoints` |
| adapter.safetensors | the result; a run that has it is finished |

The directory itself is never deleted: it may be a link or a mount. A run owns it once it has made checkpoints/ there,
which only one of those that start at once can. config.json stays until the next one takes its place, so that a start
that is killed leaves what may be started over. While a run is carried out, `exclusive_lock` keeps others out.

A bucket (gs://) has neither folders of its own nor locks. There a run belongs to the process that config.json names,
which is the one that started or resumed it last: another looks before each of its writes (`check_owner`) and ends.
"""

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stable_lora_jax.locations import Location, delete, is_url, location, write_whole
from stable_lora_jax.training.checkpoints import newest_step
from stable_lora_jax.training.metrics import read_metrics
from stable_lora_jax.training.provenance import commit, versions

_CONFIG = "config.json"
_ADAPTER = "adapter.safetensors"
_CHECKPOINTS = "checkpoints"
_METRICS = "metrics.jsonl"
_PARTIAL = f"{_CONFIG}.partial"
_LOCK = ".lock"
# What counts as nothing there.
_NOTHING = {_PARTIAL, _LOCK}
# What a start writes itself, next to config.json: nothing worth keeping without a checkpoint.
_STARTED = {_CHECKPOINTS, _PARTIAL, _METRICS, f"{_METRICS}.partial", "tensorboard"}
# This process, in the config.json of a run that it owns.
_OWNER = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"


class LostRunError(RuntimeError):
    """Another process has taken over the run; the message names it."""


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, whether it exists or not.

    Args:
      path: of the directory, in a file system that all processes of the run share, or gs://BUCKET/...

    Raises:
      ValueError: another kind of URL, or the package for it is missing.
    """

    path: Location

    def __post_init__(self):
        object.__setattr__(self, "path", location(self.path))

    @property
    def is_remote(self) -> bool:
        """Whether the run lives in a bucket."""
        return is_url(self.path)

    @property
    def config_file(self) -> Location:
        """The configuration."""
        return self.path / _CONFIG

    @property
    def metrics_file(self) -> Location:
        """What was measured, a line at a time."""
        return self.path / _METRICS

    @property
    def checkpoints(self) -> Location:
        """The folder of checkpoints."""
        return self.path / _CHECKPOINTS

    @property
    def adapter(self) -> Location:
        """The trained adapter."""
        return self.path / _ADAPTER

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.adapter.is_file()

    @property
    def is_started(self) -> bool:
        """Whether there are checkpoints, or a place for them, and no result yet."""
        begun = self.config_file.is_file() if self.is_remote else self.checkpoints.is_dir()
        return begun and not self.is_finished

    def newest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, None if there is none."""
        return newest_step(self.checkpoints)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl; none if there is no such file."""
        return read_metrics(self.metrics_file)

    def record(self) -> dict[str, Any]:
        """Returns config.json, whose "config" is the configuration by section; nothing if there is no such file.

        Raises:
          ValueError: the file is damaged, or not a run's.
        """
        if not self.config_file.exists():
            return {}
        try:
            record = dict(json.loads(self.config_file.read_text()))
            return record | {"config": dict(record["config"])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.config_file} does not hold a run's configuration ({type(error).__name__}: {error}). Put back a "
                "copy, or start the run again with --overwrite."
            ) from error

    def last_start(self) -> tuple[int | str | None, ...]:
        """Returns what changes when a run begins in this directory."""
        if self.is_remote:
            return (self.record().get("owner"),)
        marks = (self.config_file, self.checkpoints)
        return tuple(path.stat().st_mtime_ns if path.exists() else None for path in marks)

    def resumes(
        self,
        config: Mapping[str, Mapping[str, Any]],
        data: Mapping[str, Any],
        *,
        resume: bool,
        auto_resume: bool,
        overwrite: bool,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> bool:
        """Returns whether a run resumes here; refuses to overwrite one unasked, or to resume something else.

        Args:
          config: the configuration that decides what is computed, by section.
          data: what stands next to the configuration in config.json and tells other data.
          resume: resume, or refuse.
          auto_resume: resume if there is a checkpoint, else start.
          overwrite: the run that is there may be replaced.
          defaults: by section, of the options that a run may be too old to know.

        Raises:
          ValueError: the directory is in use, contains nothing to resume, belongs to another configuration or other
            data, or would be overwritten and does not hold a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"The run directory {self.path} is a file. Choose another --run-dir.")
        if resume and not self.config_file.exists():
            raise ValueError(f"There is no run to resume in {self.path}. Start it without --resume.")
        if (resume or auto_resume) and (before := self.record()):
            if what := _differing(_flat(defaults or {}) | _flat(before["config"]), _flat(config)):
                raise ValueError(f"The run in {self.path} was started with other values ({what}). Resume with its own.")
            if what := _differing(before, data):
                raise ValueError(
                    f"The run in {self.path} was started on other data ({what}). Resume with its own data and "
                    "tokenizer, or choose another --run-dir."
                )
            if resume or self.newest_step() is not None:
                return True
        left = {path.name for path in self._entries()} - _NOTHING
        if overwrite and not _is_a_run(left):
            raise ValueError(
                f"The run directory {self.path} contains {len(left)} entries but no run: neither {_ADAPTER} nor both "
                f"{_CONFIG} and {_CHECKPOINTS}. --overwrite only replaces runs: empty it yourself, or choose another "
                "--run-dir."
            )
        if overwrite or not left or (auto_resume and self._may_start_over(left)):
            return False
        ways = "Replace it" if auto_resume else "Resume with --resume, replace it"
        why = "is not empty" + (", and not what a run leaves that had no checkpoint yet" if auto_resume else "")
        raise ValueError(f"The run directory {self.path} {why}. {ways} with --overwrite, or choose another --run-dir.")

    @contextlib.contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """Makes the directory if need be, and keeps other processes out of it until the block or this process ends.

        In a bucket nothing is locked; see `own`.

        Raises:
          ValueError: another process is in it.
        """
        if self.is_remote:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                yield
        except Timeout:
            raise ValueError(
                f"Another process trains in {self.path} right now. Wait for its end, or choose another --run-dir."
            ) from None

    def prepare(
        self,
        config: Mapping[str, Mapping[str, Any]],
        data: Mapping[str, Any],
        seen: tuple[int | str | None, ...],
        *,
        auto_resume: bool,
        overwrite: bool,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Makes the directory a new run's own, and config.json, which is whole as soon as it is there.

        What is there is deleted with `overwrite`, and with `auto_resume` what a stopped start wrote; else nothing is.

        Args:
          config, data, auto_resume, overwrite, defaults: as in `resumes`.
          seen: `last_start`, from before `resumes` was asked first.

        Raises:
          ValueError: another run has begun there since, or what `resumes` refuses.
        """
        another = ValueError(
            f"Another run has begun in {self.path} since this one looked. Choose another --run-dir, or wait for its "
            "end."
        )
        asked: dict[str, Any] = {"resume": False, "auto_resume": auto_resume, "overwrite": overwrite}
        asked["defaults"] = defaults
        if self.last_start() != seen or self.resumes(config, data, **asked):
            raise another
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self._entries():
            if path.name not in (_CONFIG, _LOCK) and (overwrite or (auto_resume and path.name in _STARTED)):
                delete(path)
        try:
            if not self.is_remote:
                self.checkpoints.mkdir()
        except FileExistsError:
            raise another from None
        packages = versions("stable-lora-jax", "jax", "flax", "optax")
        self._write({"config": config, **data, "versions": packages, "commit": commit(Path(__file__).parent.parent)})

    def own(self) -> None:
        """Makes this process the owner of a run in a bucket that it resumes; `prepare` does so for one it starts."""
        if self.is_remote:
            self._write(self.record())

    def check_owner(self) -> None:
        """Raises LostRunError if a run in a bucket belongs to another process now; asks nothing of a file system."""
        if self.is_remote and (owner := self.record().get("owner", _OWNER)) != _OWNER:
            host, number, _ = owner.split(":")
            raise LostRunError(
                f"Another process has resumed or replaced the run in {self.path} (process {number} on {host}). This "
                "one ends and writes no more there."
            )

    def _write(self, record: dict[str, Any]) -> None:
        """Writes config.json; in a bucket with this process as the owner."""
        owner = {"owner": _OWNER} if self.is_remote else {}
        write_whole(self.config_file, (json.dumps(record | owner, indent=2) + "\n").encode())

    def _entries(self) -> list[Location]:
        """Returns what is in the directory; nothing if it does not exist, as an empty one in a bucket does not."""
        return list(self.path.iterdir()) if self.path.exists() else []

    def _may_start_over(self, left: set[str]) -> bool:
        """Returns whether a run without a checkpoint was stopped early, by what it left (next to what others put)."""
        if _CONFIG in left:
            return _ADAPTER not in left  # else it had come to its end
        return left == {_CHECKPOINTS} and not any(self.checkpoints.iterdir())


def _is_a_run(left: set[str]) -> bool:
    """Returns whether what is in a directory is a run, or what is left of one that was stopped while it started."""
    return _ADAPTER in left or {_CONFIG, _CHECKPOINTS} <= left or left - {_CONFIG} <= _STARTED


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns section.field -> value; what is in no section keeps its name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{each}": of for each, of in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in now if before.get(name) != now[name]]
    return "; ".join(f"{name}: run {before.get(name)!r}, now {now[name]!r}" for name in names)


def run_labels(runs: Sequence[Path]) -> dict[str, Path]:
    """Returns label -> run: the directory's name, or its path where two have the same name."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else run.as_posix().strip("/"): run for run in runs}
