"""Your own data: one JSON object per line: questions with choices, prompts with a completion, or conversations."""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

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


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, of which the assistant's are learnt; what they look like is the chat template's.

    Args:
      messages: `{"role": ..., "content": ...}` each, with what else the template reads (tool_calls, name, ...).
      tools: descriptions of functions that the assistant may call, as the template takes them.
      id: what messages call it; the line number of a file.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    id: str = dataclasses.field(default="", compare=False)


Item: TypeAlias = Question | Completion | Conversation

_FIELDS = {
    Question: {"question": str, "choices": list, "answer_index": int},
    Completion: {"prompt": str, "completion": str},
    Conversation: {"messages": list},
}
_KINDS = " or ".join("{" + ", ".join(fields) + "}" for fields in _FIELDS.values())
# What a message may hold beside its role and content; templates read them.
_OF_MESSAGES = {"name", "tool_calls", "tool_call_id", "reasoning_content", "thinking"}


def load_jsonl(path: str | Path) -> list[Question] | list[Completion] | list[Conversation]:
    """Returns the questions, completions or conversations of a `.jsonl` or `.jsonl.gz` file, UTF-8, all of one kind.

    A line is `{"question": str, "choices": [str, str, ...], "answer_index": int}`,
    `{"prompt": str, "completion": str}` or `{"messages": [{"role": str, "content": str}, ...]}`, the last with
    `"tools": [...]` if the assistant has some. Blank lines are skipped. An item's id is its line number.

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


def load_prompts(path: str | Path) -> list[str | list[dict[str, Any]]]:
    """Returns the prompts of a file: one per line, or of a `.jsonl` file texts or conversations to be answered.

    Raises:
      ValueError: no prompt, or a line of a .jsonl file that is neither {"prompt": str} nor {"messages": [...]}.
      FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        prompts: list[Any] = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        prompts = []
        for number, line in enumerate(_lines(path), 1):
            try:
                record = _record(line) if line.strip() else None
                if record is None:
                    continue
                if "messages" in record and isinstance(record["messages"], list) and record["messages"]:
                    _check_turns(record["messages"])
                elif not isinstance(record.get("prompt"), str) or not record["prompt"]:
                    raise ValueError("it has neither a prompt nor messages")
            except ValueError as error:
                raise ValueError(
                    f'{path}, line {number}: {error}. A line is {{"prompt": "..."}} or {{"messages": [...]}}.'
                ) from error
            prompts.append(record.get("messages") or record["prompt"])
    if not prompts:
        raise ValueError(f"{path} holds no prompt. Write one per line.")
    return prompts


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}). Copy it again, or pack it again.") from error


def _parse(line: bytes, number: int) -> Item:
    return item_of(_record(line), str(number))


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    return record


def item_of(record: dict[str, Any], name: str) -> Item:
    """Returns the question, completion or conversation in a record.

    Args:
      record: its fields, as in a line of a file.
      name: the item's id.

    Raises:
      ValueError: a field is missing, unknown or of another type.
    """
    if "messages" in record:
        tools = record.get("tools") or []
        _check_fields({key: value for key, value in record.items() if key != "tools"}, _FIELDS[Conversation])
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"tools is {tools!r}, not a list of objects")
        _check_messages(record["messages"])
        return Conversation(tuple(record["messages"]), tuple(tools), name)
    kind = Question if record.keys() & _FIELDS[Question] else Completion
    _check_fields(record, _FIELDS[kind])
    if kind is Completion:
        return Completion(**record, id=name)
    _check_choices(record["choices"], record["answer_index"])
    choices = tuple(choice.strip() for choice in record["choices"])
    return Question(name, record["question"].strip(), choices, record["answer_index"])


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


def _check_messages(messages: list[Any]) -> None:
    _check_turns(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn")


def _check_turns(messages: list[Any]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} is {message!r}, not an object with a role")
        if unknown := sorted(message.keys() - _OF_MESSAGES - {"role", "content"}):
            raise ValueError(f"message {index} has the unknown field {', '.join(unknown)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"message {index} has the content {content!r}; texts alone can be learnt")


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
