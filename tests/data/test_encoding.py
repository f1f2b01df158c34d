"""What is taught is the joined text, for every kind of tokenizer."""

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stable_lora_jax.data import (
    Completion,
    Encoded,
    Question,
    digest,
    encode_all,
    format_question,
    load_task,
    right_branch_only,
)

LINES = [
    "The tree is big. A tree! 2+2=4, x=y",
    "Q: 2+2\nA: 4\n\n",
    "a\n\nb",
    "café e\u0301",
    "Question: Is it?\nAnswer: yes",
]
PAIRS = [
    ("Q: 2+2\nA:", " tree"),
    ("2+2=", "4"),
    ("The tr", "ee is big"),
    ("é", "\u0301"),
    ("a\n", "\nb"),
    ("a ", " b"),
    ("The tree ", "is big"),
]


def _metaspace(scheme):
    def parts():
        metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        return models.BPE(), trainers.BpeTrainer, None, metaspace, decoders.Metaspace(prepend_scheme=scheme)

    return parts


def _prepend():
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return models.BPE(), trainers.BpeTrainer, normalizer, None, decoder


def _byte_level():
    return (
        models.BPE(),
        trainers.BpeTrainer,
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )


def _unigram():
    return models.Unigram(), trainers.UnigramTrainer, None, pre_tokenizers.Metaspace(), decoders.Metaspace()


def _byte_fallback():
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return (
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer,
        normalizer,
        None,
        decoder,
    )


def _word_piece():
    return (
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        None,
        pre_tokenizers.Whitespace(),
        decoders.WordPiece(),
    )


KINDS = {
    "byte-level BPE": _byte_level,
    "Metaspace always": _metaspace("always"),
    "Metaspace first": _metaspace("first"),
    "Metaspace never": _metaspace("never"),
    "Prepend": _prepend,
    "Unigram": _unigram,
    "byte fallback": _byte_fallback,
    "WordPiece": _word_piece,
}


def _train(kind, lines, size, begin=False):
    model, trainer, normalizer, pre_tokenizer, decoder = KINDS[kind]()
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    special = ["<unk>", "<s>", "</s>", *([f"<0x{byte:02X}>" for byte in range(256)] if kind == "byte fallback" else [])]
    options = {"unk_token": "<unk>"} if kind == "Unigram" else {}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte-level BPE" else []
    tokenizer.train_from_iterator(
        lines,
        trainer(vocab_size=size, special_tokens=special[:3], initial_alphabet=alphabet, show_progress=False, **options),
    )
    if kind == "byte fallback":
        tokenizer.add_tokens(special[3:])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# Where the tokenizer would join all of the prompt with the answer, both are cut apart; WordPiece forgets spaces.
CUT = {
    **{f"Metaspace {scheme}": {"a\n"} for scheme in ("always", "first", "never")},
    **{kind: {"The tr", "The tree ", "a\n"} for kind in ("Prepend", "byte fallback")},
}
LOSSY = {"WordPiece"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_taught_as_the_joined_text(kind: str) -> None:
    tokenizer = _train(kind, LINES * 20, 400)
    examples = encode_all(tokenizer, [Completion(*pair) for pair in PAIRS])
    for (prompt, completion), example in zip(PAIRS, examples, strict=True):
        *branch, end = example.branches[0]
        tokens = [*example.prefix, *branch]
        joined = tokenizer.encode(prompt + completion, add_special_tokens=False)
        assert end == tokenizer.eos_token_id
        assert tokenizer.decode(tokens) == (tokenizer.decode(joined) if kind in LOSSY else prompt + completion)
        assert (tokens == joined) == (prompt not in CUT.get(kind, ()))
        assert example.moved == (example.prefix != tuple(tokenizer.encode(prompt)) or prompt in CUT.get(kind, ()))


def test_a_token_that_spans_prompt_and_answer_belongs_to_the_answer() -> None:
    tokenizer = _train("Metaspace always", LINES * 20, 400)
    (example,) = encode_all(tokenizer, [Completion("The tr", "ee is big")])
    assert tokenizer.convert_ids_to_tokens(example.prefix) == ["▁The"]
    assert tokenizer.convert_ids_to_tokens(example.branches[0])[:2] == ["▁tree", "▁is"]
    (example,) = encode_all(tokenizer, [Completion("2+2=", "4")])
    assert tokenizer.convert_ids_to_tokens(example.branches[0]) == ["4", "</s>"]  # not "▁4"


# How many of the 570 questions have a token that spans the prompt's end, with a vocabulary of 2000 trained on them.
# Without a pre-tokenizer ":▁the" and the like are tokens.
MOVED = {"Prepend": 548, "byte fallback": 548}


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_is_the_joined_text(kind: str) -> None:
    questions = load_task("arc_easy", "validation")
    texts = [format_question(question, "cloze") for question in questions]
    joined = [[prompt + answer for answer in answers] for prompt, answers in texts]
    tokenizer = _train(kind, itertools.chain.from_iterable(joined), 2000, begin=True)
    examples = encode_all(tokenizer, questions)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for question, texts_of_one, example in zip(questions, joined, examples, strict=True):
        rows = [[*example.prefix, *branch] for branch in example.branches]
        assert rows == tokenizer(texts_of_one)["input_ids"]
        assert all(row.count(begin) == 1 and end not in row for row in rows)
        if kind not in LOSSY:
            assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == texts_of_one
        assert example.answer == question.answer_index
    assert sum(example.moved for example in examples) == MOVED.get(kind, 0)


def test_begin_and_end_tokens_in_the_text_are_not_doubled() -> None:
    tokenizer = _train("byte-level BPE", LINES * 20, 400, begin=True)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for completion in (Completion("Q: 2+2\nA:", " 4"), Completion("<s>Q: 2+2\nA:", " 4</s>")):
        (example,) = encode_all(tokenizer, [completion])
        assert (example.prefix.count(begin), example.prefix[0]) == (1, begin)
        assert (example.branches[0].count(end), example.branches[0][-1]) == (1, end)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Completion("x", "", id="7"), r"completion '7' has the prompt 'x' and the answers \[''\]; each needs a text"),
        (Completion("", "x"), r"a completion has the prompt '' and the answers \['x'\]; each needs a text"),
        (Completion("x", "y"), r"a completion has the prompt 'x' and the answers \['y'\], which the tokenizer"),
    ],
)  # fmt: skip
def test_what_leaves_a_side_empty_is_refused(item: Completion, message: str) -> None:
    tokenizer = _train("WordPiece", LINES * 20, 400)
    with pytest.raises(ValueError, match=message):
        encode_all(tokenizer, [item])


def test_one_equals_many(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = load_task("arc_easy", "validation")[:5]
    assert [encode_all(tokenizer, [q], "cloze")[0] for q in questions] == encode_all(tokenizer, questions, "cloze")
    assert encode_all(tokenizer, []) == []


def test_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode_all(tokenizer, [Completion("2 + 2 =", " 4")])
    assert tokenizer.decode(example.prefix) == "2 + 2 ="
    assert tokenizer.decode(example.branches[0]) == " 4<|im_end|>"
    assert (len(example.branches), example.answer) == (1, 0)


ICE = Question("1", "Is ice cold?", ("yes", "no", "50 s"), 1)


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
