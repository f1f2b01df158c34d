"""metrics.jsonl: one JSON object a line, appended during a run, readable at any time.

Lines: ``{"step", "loss", "grad_norm", "update_norm", "learning_rate", "tokens_per_second", "stable", "pairs"}`` every
step; ``{"step", "pair", "index", "stable": true}`` when a matrix becomes stable; ``{"step", "norms": {pair: {norm_a,
norm_b, gap, delta_1, delta_2, delta_3}}}`` every few steps, each a list over the matrices of a stack (the last three,
see `update_terms`, only after a step), and with LoRA-RITE ``{"step", "lora_rite": {clip_factor, skipped_a,
skipped_b}}``; ``{"step", "validation": {"loss", "accuracy"}}`` at every validation, the accuracy of questions alone.
What is not finite (the gap while B = 0) is null.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


class MetricsFile:
    """Appends to a metrics file; on resume, lines after the step resumed from are dropped.

    Args:
      path: the file.
      resume_step: keep existing lines up to this step; 0 starts anew.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        """Appends one line; arrays become lists, non-finite numbers null."""
        self._file.write(json.dumps(_plain(values)) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line cut short by a kill is left out.

    Raises:
      ValueError: another line is damaged.
    """
    texts, lines = path.read_text(errors="replace").splitlines() if path.exists() else [], []
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
