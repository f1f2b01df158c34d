"""Formats, and that tokenizing prefix and branches apart equals tokenizing the joined text."""

import pytest
from transformers import PreTrainedTokenizerBase

from stable_lora_jax.data import (
    TASKS,
    Encoded,
    Question,
    encode_all,
    format_question,
    load_task,
)

ICE = Question("1", "Is ice cold?", ("yes", "no", "50 s"), 1)


def test_formats() -> None:
    assert format_question(ICE, "cloze") == ("Question: Is ice cold?\nAnswer:", [" yes", " no", " 50 s"])
    letter = "Question: Is ice cold?\nA. yes\nB. no\nC. 50 s\nAnswer:"
    assert format_question(ICE, "letter") == (letter, [" A", " B", " C"])
    story = Question("2", "Canoeing: Two women", ("sit.", "swim."), 0, continues=True)
    assert format_question(story, "cloze") == ("Canoeing: Two women", [" sit.", " swim."])
    assert format_question(story, "letter")[0] == "Question: Canoeing: Two women\nA. sit.\nB. swim.\nAnswer:"


@pytest.mark.parametrize("prompt_format", ["cloze", "letter"])
@pytest.mark.parametrize("name", TASKS)
def test_apart_equals_joined(tokenizer: PreTrainedTokenizerBase, name: str, prompt_format: str) -> None:
    questions = load_task(name, "validation")[::10]
    encoded = encode_all(tokenizer, questions, prompt_format)
    for question, example in zip(questions, encoded, strict=True):
        prompt, texts = format_question(question, prompt_format)
        assert [[*example.prefix, *branch] for branch in example.branches] == tokenizer([prompt + t for t in texts])[
            "input_ids"
        ]
        assert example.answer == question.answer_index


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"unknown prompt format 'chat'; known: cloze, letter. Use one of these."):
        format_question(ICE, "chat")
    many = Question("9", "q", tuple(map(str, range(27))), 0)
    with pytest.raises(ValueError, match=r"question '9' has 27 choices; the letter format allows 26. Use the cloze"):
        format_question(many, "letter")
    for bad in (((), ((1,),), 0), ((1,), (), 0), ((1,), ((1,), ()), 0), ((1,), ((1,),), 1), ((1,), ((1,),), -1)):
        with pytest.raises(ValueError, match=r"got a prefix of \d tokens, branches of \[.*\] and answer .*Remove this"):
            Encoded(*bad)
