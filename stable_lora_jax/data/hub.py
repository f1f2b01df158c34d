"""Any data set of the Hugging Face hub, or a local folder that `datasets` reads, by its own columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_lora_jax.data.jsonl import Item, item_of

_FIELDS = ("question", "choices", "answer_index", "prompt", "completion", "messages", "tools")


def load_hub(name: str, split: str, columns: Mapping[str, str]) -> list[Item]:
    """Returns the questions, completions or conversations of a data set.

    Args:
      name: "hub:OWNER/NAME", or "hub:OWNER/NAME:CONFIGURATION"; "hub:./FOLDER" reads a local one.
      split: e.g. "train".
      columns: field -> its column, for fields (`prompt`, `completion`, `messages`, ...) whose column has another
        name. Columns that are no field's are left out.

    Raises:
      ValueError: no such column, or a row that is not as a line of a file must be; it names the row.
      ConnectionError: the hub did not give it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    path, _, configuration = name.removeprefix("hub:").partition(":")
    try:
        rows: Any = load_dataset(path, configuration or None, split=split)
    except (DatasetNotFoundError, OSError) as error:
        raise ConnectionError(
            f"{path} cannot be loaded from the hub ({str(error).splitlines()[0]}). Check the name and the connection, "
            "or give a .jsonl file."
        ) from error
    known = set(rows.column_names)
    if missing := sorted(set(columns.values()) - known):
        raise ValueError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(sorted(known))}. Correct --map."
        )
    chosen = {field: column for field in (*_FIELDS, *columns) if (column := columns.get(field, field)) in known}
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(item_of({field: _plain(row[column]) for field, column in chosen.items()}, str(number)))
        except ValueError as error:
            raise ValueError(
                f"{name}, row {number}: {error}. Say which columns to take, e.g. --map "
                f"prompt=instruction,completion=output; there are {', '.join(sorted(known))}."
            ) from error
    return items


def _plain(value: Any) -> Any:
    """Returns a value without the None that a table has where a record lacks a key."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def parse_columns(text: str) -> dict[str, str]:
    """Returns field -> column from "field=column,...".

    Raises:
      ValueError: another form, or a field that is named twice.

    Examples:
      >>> parse_columns("prompt=instruction,completion=output")
      {'prompt': 'instruction', 'completion': 'output'}
    """
    split = [pair.partition("=") for pair in text.split(",")] if text else []
    fields = [field for field, _, _ in split]
    if not all(field and column for field, _, column in split) or len({*fields}) < len(fields):
        raise ValueError(f"map={text!r} is not understood. Write field=column,field=column, each field once.")
    return {field: column for field, _, column in split}
