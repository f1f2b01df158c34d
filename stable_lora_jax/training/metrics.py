"""metrics.jsonl: one JSON object a line, appended during a run, readable at any time.

Lines: ``{"step", "loss", "grad_norm", "update_norm", "learning_rate", "tokens_per_second", "stable", "pairs"}`` every
step; ``{"step", "pair", "index", "stable": true}`` when a matrix becomes stable; ``{"step", "norms": {pair: {norm_a,
norm_b, gap, delta_1, delta_2, delta_3}}}`` every few steps, each a list over the matrices of a stack (the last three,
see `update_terms`, only after a step), and with LoRA-RITE ``{"step", "lora_rite": {clip_factor, skipped_a,
skipped_b}}``; ``{"step", "validation": {"loss", "accuracy"}}`` at every validation, the accuracy of questions alone.
What is not finite (the gap while B = 0) is null.

Nothing can be appended in a bucket: there the whole file is written anew, every half minute and before a checkpoint.
"""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stable_lora_jax.locations import Location, is_url, location, write_whole

_SECONDS = 30  # between two writes of a file in a bucket


class MetricsFile:
    """Appends to a metrics file; on resume, lines after the step resumed from are dropped.

    Args:
      path: the file.
      resume_step: keep existing lines up to this step; 0 starts anew.
      check: called before a file in a bucket is written; raises where that must not be.
    """

    def __init__(self, path: Location, resume_step: int = 0, check: Callable[[], None] = lambda: None):
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        self._path, self._check = location(path), check
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        self._check()
        write_whole(self._path, self._text.encode())
        self._written, self._time = len(self._text), time.monotonic()
        self._file = None if is_url(self._path) else self._path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        """Appends one line; arrays become lists, non-finite numbers null."""
        line = json.dumps(_plain(values)) + "\n"
        if self._file is not None:
            self._file.write(line)
            return
        self._text += line
        if time.monotonic() - self._time > _SECONDS:
            self.sync()

    def sync(self) -> None:
        """Makes sure that every line is in the file."""
        if self._file is None and self._written < len(self._text):
            self._check()
            write_whole(self._path, self._text.encode())
            self._written, self._time = len(self._text), time.monotonic()

    def close(self) -> None:
        """Writes what is not written yet, and closes the file."""
        self.sync()
        if self._file is not None:
            self._file.close()


def read_metrics(path: Location) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line cut short by a kill is left out.

    Raises:
      ValueError: another line is damaged.
    """
    path = location(path)
    texts = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(texts):
                raise ValueError(
                    f"{path}, line {number} of {len(texts)} is not a JSON object ({error}). Correct or remove the line."
                ) from error
    return lines


def stop_steps(lines: list[dict[str, Any]]) -> dict[str, dict[tuple[int, ...], int]]:
    """Returns pair -> index in its stack -> step at which that matrix became stable."""
    stops: dict[str, dict[tuple[int, ...], int]] = {}
    for line in lines:
        if "pair" in line:
            stops.setdefault(line["pair"], {})[tuple(line["index"])] = line["step"]
    return stops


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
