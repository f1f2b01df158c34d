"""Formats, and that tokenizing prefix and branches apart equals tokenizing the joined text."""

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stable_lora_jax.data import (
    TASKS,
    Completion,
    Encoded,
    Question,
    digest,
    encode_all,
    format_question,
    load_task,
    right_branch_only,
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


def test_one_equals_many(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = load_task("arc_easy", "validation")[:5]
    assert [encode_all(tokenizer, [q], "cloze")[0] for q in questions] == encode_all(tokenizer, questions, "cloze")
    assert encode_all(tokenizer, []) == []


def test_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode_all(tokenizer, [Completion("2 + 2 =", " 4")])
    assert tokenizer.decode(example.prefix) == "2 + 2 ="
    assert tokenizer.decode(example.branches[0]) == " 4<|im_end|>"
    assert (len(example.branches), example.answer) == (1, 0)


def test_begin_token_where_the_tokenizer_adds_one(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    with_begin = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>")
    (plain,) = encode_all(tokenizer, [ICE])
    assert encode_all(with_begin, [ICE]) == [Encoded((1, *plain.prefix), plain.branches, 1)]
    with pytest.raises(ValueError, match=r"no end-of-sequence token; completions need one .* Set tokenizer.eos_token"):
        encode_all(with_begin, [Completion("p", "c")])


def test_right_branch_and_sizes() -> None:
    example = Encoded((5, 6, 7), ((1,), (2, 3, 4)), 1)
    assert (example.length, example.num_targets) == (5, 4)
    assert right_branch_only(example) == Encoded((5, 6, 7), ((2, 3, 4),), 0)


def test_a_digest_tells_other_examples() -> None:
    examples = [Encoded((5, 6), ((1,), (2, 3)), 1), Encoded((7,), ((8,),), 0)]
    others = [
        examples[::-1],
        examples[:1],
        [Encoded((5, 6), ((1,), (2, 3)), 0), examples[1]],
        [Encoded((5,), ((6, 1), (2, 3)), 1), examples[1]],
        [Encoded((5, 6), ((1, 2), (3,)), 1), examples[1]],
    ]
    assert digest(list(examples)) == digest(examples)
    assert len({digest(each) for each in (examples, *others)}) == 6


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"unknown prompt format 'chat'; known: cloze, letter. Use one of these."):
        format_question(ICE, "chat")
    many = Question("9", "q", tuple(map(str, range(27))), 0)
    with pytest.raises(ValueError, match=r"question '9' has 27 choices; the letter format allows 26. Use the cloze"):
        format_question(many, "letter")
    for bad in (((), ((1,),), 0), ((1,), (), 0), ((1,), ((1,), ()), 0), ((1,), ((1,),), 1), ((1,), ((1,),), -1)):
        with pytest.raises(ValueError, match=r"got a prefix of \d tokens, branches of \[.*\] and answer .*Remove this"):
            Encoded(*bad)
