"""Good lines load; each kind of bad line is named with file, number and reason."""

import gzip
import re
from pathlib import Path

import pytest

from stable_lora_jax.data import Completion, Question, load_jsonl

QUESTION = '{"question": "Is ice cold? ", "choices": ["yes", " no"], "answer_index": 0}'
COMPLETION = '{"prompt": "2 + 2 =", "completion": " 4\\n"}'


def test_questions(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{QUESTION}\n\n{QUESTION}\n")
    assert load_jsonl(path) == [Question(str(i), "Is ice cold?", ("yes", "no"), 0) for i in (1, 3)]


def test_completions_packed(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress(COMPLETION.encode()))
    assert load_jsonl(str(path)) == [Completion("2 + 2 =", " 4\n")]


BAD = {
    '{"question": ': "invalid JSON (Expecting value",
    "\xff": "invalid JSON (",
    "[1, 2]": "a JSON list, not an object",
    "{}": "missing field prompt, completion",
    '{"question": "q", "choices": ["a", "b"]}': "missing field answer_index",
    '{"prompt": "p", "completion": "c", "id": 3}': "unknown field id",
    '{"question": 3, "choices": ["a", "b"], "answer_index": 0}': "question is 3, not of type str",
    '{"question": "q", "choices": "ab", "answer_index": 0}': "choices is 'ab', not of type list",
    '{"question": "q", "choices": ["a", "b"], "answer_index": true}': "answer_index is True, not of type int",
    '{"question": "q", "choices": ["a", "b"], "answer_index": "0"}': "answer_index is '0', not of type int",
    '{"question": "q", "choices": ["a", "b"], "answer_index": 2}': "answer_index is 2, but the choices are 0 to 1",
    '{"question": "q", "choices": ["a", "b"], "answer_index": -1}': "answer_index is -1, but the choices are 0 to 1",
    '{"question": "q", "choices": ["a"], "answer_index": 0}': "1 choices, but at least 2 are needed",
    '{"question": "q", "choices": ["a", " "], "answer_index": 0}': "choice 1 is ' ', not a text",
    '{"question": "q", "choices": ["a", null], "answer_index": 0}': "choice 1 is None, not a text",
    '{"question": " ", "choices": ["a", "b"], "answer_index": 0}': "question is empty",
    '{"prompt": "p", "completion": ""}': "completion is empty",
    '{"prompt": "p", "completion": "c", "prompt": "q"}': "field prompt stands there more than once",
    '{"question": "q", "choices": ["a", "b", " a"], "answer_index": 0}': "choices 0 and 2 are the same text 'a'",
    "[" * 100_000: "invalid JSON (",
    '{"prompt": "p", "completion": "\\ud800"}': "'utf-8' codec can't encode character",
    COMPLETION: "a completion, but the lines before hold another kind",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{QUESTION}\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError) as error:
        load_jsonl(path)
    text = str(error.value)
    assert text.startswith(f"{path}, line 2: {BAD[line]}")
    kinds = "{question, choices, answer_index} or {prompt, completion} or {messages}"
    assert text.endswith(f". A line is {kinds}; correct or remove it.")


def test_bad_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=re.escape("empty.jsonl holds no line; at least one is needed. A line is {")):
        load_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=re.escape("mine.csv has an unknown ending; allowed are .jsonl and .jsonl.gz")):
        load_jsonl(tmp_path / "mine.csv")
    packed = gzip.compress(20 * f"{COMPLETION}\n".encode())
    for damaged in (packed[:-20], packed[:20] + bytes(9) + packed[29:], COMPLETION.encode()):
        (tmp_path / "cut.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut.jsonl.gz is no whole gzip file \(.*Copy it again"):
            load_jsonl(tmp_path / "cut.jsonl.gz")
