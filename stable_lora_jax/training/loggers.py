"""Where the lines of metrics.jsonl go besides the file: TensorBoard and Weights & Biases.

A logger has the two methods of `MetricsFile`. Numbers become series, arrays over the matrices of a stack histograms and
the series of their median; both are named by their path, as in "norms/layers/self_attn/q_proj/gap".
"""

import importlib.util
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stable_lora_jax.locations import Location, is_url
from stable_lora_jax.training.run_directory import RunDirectory

# name -> the package it needs, which is also the name of the extra
LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Logger(Protocol):
    """Takes the lines of metrics.jsonl (see `stable_lora_jax.training.metrics`) as they come."""

    def write(self, **values: Any) -> None:
        """Takes one line: "step" and what was measured there."""

    def close(self) -> None:
        """Finishes writing."""


def check_logger(name: str) -> None:
    """Raises ValueError unless `name` is a logger whose package is installed."""
    if name not in LOGGERS:
        raise ValueError(f"log={name!r} is unknown. Known: {', '.join(LOGGERS)}.")
    if importlib.util.find_spec(LOGGERS[name]) is None:
        raise ValueError(f"log={name!r} needs the package {LOGGERS[name]}. Run: pip install 'stable-lora-jax[{name}]'")


def sign_in(name: str) -> None:
    """Makes sure that a logger's service will take a run, or raises ValueError; asks nothing of those without one."""
    check_logger(name)
    if name == "wandb":
        import wandb
        from wandb.errors import Error

        try:
            wandb.login()
        except Error as error:
            raise ValueError(f"log='wandb': {error} Or set WANDB_MODE=offline, and `wandb sync` later.") from error


def make_logger(name: str, run_dir: Location, resume_step: int) -> Logger:
    """Returns a logger by name.

    Args:
      name: one of `LOGGERS`.
      run_dir: the run's directory; its config.json, if there, is the run's configuration.
      resume_step: the step a resumed run starts at. TensorBoard replaces what was logged after it; Weights & Biases
        keeps that, and takes new values only from where its log ends.

    Raises:
      ValueError: an unknown name, or its package is not installed.
    """
    check_logger(name)
    return {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}[name](run_dir, resume_step)


class _TensorBoard:
    """Event files in run_dir/tensorboard."""

    def __init__(self, run_dir: Location, resume_step: int):
        from tensorboardX import SummaryWriter

        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, *, step: int, **values: Any) -> None:
        for name, value in _named(values):
            if isinstance(value, float):
                self._writer.add_scalar(name, value, step)
            else:
                self._writer.add_histogram(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run in run_dir/wandb (wandb/ of the working directory if that is in a bucket); see also WANDB_MODE=offline."""

    def __init__(self, run_dir: Location, resume_step: int):
        import wandb

        identity = run_dir / "wandb-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project="stable-lora-jax",
            name=run_dir.name,
            dir=None if is_url(run_dir) else run_dir,
            id=identity.read_text(),
            resume="allow" if resume_step else None,
            config=RunDirectory(run_dir).record(),
        )

    def write(self, *, step: int, **values: Any) -> None:
        named = {
            name: value if isinstance(value, float) else self._histogram(np_histogram=np.histogram(value))
            for name, value in _named(values)
        }
        if named:
            self._run.log(named, step=step)

    def close(self) -> None:
        self._run.finish()


def _named(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | np.ndarray]]:
    """Yields (name, number or array) of all that is finite; a line about one matrix's stop has nothing to plot."""
    if "pair" in values:
        return
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _named(value, f"{name}/")
            continue
        finite = np.asarray(value, float)
        finite = finite[np.isfinite(finite)]
        if finite.size > 1:
            yield f"{name}/histogram", finite
            yield name, float(np.median(finite))
        elif finite.size:
            yield name, float(finite[0])
