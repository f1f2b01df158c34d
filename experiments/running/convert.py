"""Converts lines and config.json of version 0.1, whose configurations were flat, to configurations in sections.

Command:   python -m experiments.running.convert experiments/results/*.jsonl        (or runs/*/config.json)
Hardware:  any. Minutes: 0.1.

Numbers that the run's method did not have are dropped (AdamW knows no λ), and what the old version did without saying
is written down. No measured number changes; keys do, as they are made of the configuration.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.running.cells import Record, cell_of
from stable_lora_jax.finetune import RunConfig, fingerprint, numbers_of, options_of

# Options of version 0.1 that are no more -> the only value that a run may have had.
_GONE = {"drop_overlap": False}


def converted(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns a flat configuration in sections.

    Raises:
      ValueError: it says what the new version cannot do.
    """
    for name, value in _GONE.items():
        if flat.get(name, value) != value:
            raise ValueError(f"{name}={flat[name]!r} is no more; only {value!r} can be converted. Leave the line out.")
    options: dict[str, Any] = {"pack": False} | {name: value for name, value in flat.items() if name not in _GONE}
    return fingerprint(RunConfig.of(**numbers_of(options["method"], options)))


def converted_line(line: Record) -> Record:
    """Returns a line with its configuration in sections and the key that this gives; a converted one as it is."""
    if "train" not in line or all(isinstance(value, Mapping) for value in line["train"].values()):
        return line
    line = line | {"train": converted(line["train"])}
    return line | {"key": cell_of(line | {"train": options_of(line["train"])}).key}


def convert(file: Path) -> None:
    """Converts a file in place."""
    text = file.read_text()
    if file.suffix == ".jsonl":
        lines = [converted_line(json.loads(line)) for line in text.splitlines()]
        made = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    else:
        record = json.loads(text)
        made = json.dumps(record | {"config": converted(record["config"])}, indent=2) + "\n"
    file.write_text(made)


def main(files: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Converts these files in place."""
    for file in files:
        convert(file)


if __name__ == "__main__":
    tyro.cli(main)
