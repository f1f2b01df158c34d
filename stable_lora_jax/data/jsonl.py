"""Your own data: one JSON object per line, either questions with choices or prompts with a completion."""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_lora_jax.data.tasks import Question


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and the text to learn after it. Both are used as they are: no space is added or removed.

    Args:
        prompt: what comes before.
        completion: what is learnt.
        id: what messages call it; the line number of a file.
    """

    prompt: str
    completion: str
    id: str = dataclasses.field(default="", compare=False)


_FIELDS = {
    Question: {"question": str, "choices": list, "answer_index": int},
    Completion: {"prompt": str, "completion": str},
}
_KINDS = " or ".join("{" + ", ".join(fields) + "}" for fields in _FIELDS.values())


def load_jsonl(path: str | Path) -> list[Question] | list[Completion]:
    """The questions or the completions of a `.jsonl` or `.jsonl.gz` file, UTF-8, all of one kind.

    A line is `{"question": str, "choices": [str, str, ...], "answer_index": int}` or
    `{"prompt": str, "completion": str}`. Blank lines are skipped. A question's id is its line number.

    Raises:
        ValueError: an empty or cut file, or a line that is not as above; it names the file, the line and the reason.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} has an unknown ending; allowed are .jsonl and .jsonl.gz. Rename or convert the file.")
    items: list[Any] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            item = _parse(line, number)
            if items and type(item) is not type(items[0]):
                raise ValueError(f"a {type(item).__name__.lower()}, but the lines before hold another kind")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}. A line is {_KINDS}; correct or remove it.") from error
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no line; at least one is needed. A line is {_KINDS}.")
    return items


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}). Copy it again, or pack it again.") from error


def _parse(line: bytes, number: int) -> Question | Completion:
    try:
        record = json.loads(line, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    kind = Question if record.keys() & _FIELDS[Question] else Completion
    _check_fields(record, _FIELDS[kind])
    if kind is Completion:
        return Completion(**record, id=str(number))
    _check_choices(record["choices"], record["answer_index"])
    choices = tuple(choice.strip() for choice in record["choices"])
    return Question(str(number), record["question"].strip(), choices, record["answer_index"])


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object; Python's reader would keep the last of two fields of one name."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"field {', '.join(twice)} stands there more than once")
    return dict(pairs)


def _check_fields(record: dict[str, Any], fields: dict[str, type]) -> None:
    if missing := [name for name in fields if name not in record]:
        raise ValueError(f"missing field {', '.join(missing)}")
    if extra := [name for name in record if name not in fields]:
        raise ValueError(f"unknown field {', '.join(extra)}")
    for name, kind in fields.items():
        value = record[name]
        # In Python a bool is an int; in the file it is a mistake.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, not of type {kind.__name__}")
        if kind is str and not value.strip():
            raise ValueError(f"{name} is empty")


def _check_choices(choices: list[Any], answer: int) -> None:
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choices, but at least 2 are needed")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"choice {index} is {choice!r}, not a text")
    same = [choice.strip() for choice in choices]
    if twice := next((index for index, choice in enumerate(same) if choice in same[:index]), 0):
        raise ValueError(f"choices {same.index(same[twice])} and {twice} are the same text {same[twice]!r}")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer_index is {answer}, but the choices are 0 to {len(choices) - 1}")
