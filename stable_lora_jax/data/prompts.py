"""Questions and completions as token numbers: a shared prefix and one branch per answer.

Prefix and branches are tokenized apart. For byte-level BPE this equals tokenizing the joined text, because a branch
begins with a space, where such tokenizers cut anyway (measured on all five tasks in `tests/data/test_prompts.py`).
A SentencePiece tokenizer may cut differently there; the model then sees the same pieces in training and evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stable_lora_jax.data.jsonl import Completion
from stable_lora_jax.data.tasks import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROMPT_FORMATS = ("cloze", "letter")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token numbers of one question or completion.

    Args:
        prefix: what every answer shares, at least one token (it predicts the first token of each branch).
        branches: the answers, at least one, each of at least one token.
        answer: index of the right branch.

    Raises:
        ValueError: an empty prefix or branch, no branch, or an answer that is not a branch.
    """

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    answer: int

    def __post_init__(self):
        sizes = [len(branch) for branch in self.branches]
        if not self.prefix or not all(sizes) or not 0 <= self.answer < len(sizes):
            raise ValueError(
                f"got a prefix of {len(self.prefix)} tokens, branches of {sizes} and answer {self.answer}; a prefix "
                "and branches of at least one token are allowed, and an answer from 0 to branches - 1. "
                "Remove this example."
            )

    @property
    def length(self) -> int:
        """Input tokens of its row: the prefix, and every branch without its last token, which is only predicted."""
        return len(self.prefix) + sum(map(len, self.branches)) - len(self.branches)

    @property
    def num_targets(self) -> int:
        """Predicted tokens: those of all branches."""
        return sum(map(len, self.branches))


def right_branch_only(encoded: Encoded) -> Encoded:
    """The same example with the right answer as its only branch, for training on the answer's tokens."""
    return Encoded(encoded.prefix, (encoded.branches[encoded.answer],), 0)


def digest(examples: Sequence[Encoded]) -> str:
    """The SHA-256 of the examples, in their order: of another number, token or answer it is another."""
    total = hashlib.sha256()
    for example in examples:
        for numbers in ((len(example.branches), example.answer), example.prefix, *example.branches):
            total.update(array("q", (len(numbers), *numbers)))
    return total.hexdigest()


def format_question(question: Question, prompt_format: str) -> tuple[str, list[str]]:
    r"""The prompt and the text of each branch.

    `cloze`: "Question: {question}\nAnswer:" and " {choice}". Where choices continue the text (HellaSwag) the prompt is
    the text alone, as evaluation harnesses do. `letter`: the choices are listed and the branches are " A", " B", ...

    >>> format_question(Question("1", "Is ice cold?", ("yes", "no"), 0), "letter")
    ('Question: Is ice cold?\nA. yes\nB. no\nAnswer:', [' A', ' B'])

    Raises:
        ValueError: unknown format, or more choices than letters.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(
            f"unknown prompt format {prompt_format!r}; known: {', '.join(PROMPT_FORMATS)}. Use one of these."
        )
    if prompt_format == "cloze":
        prompt = question.question if question.continues else f"Question: {question.question}\nAnswer:"
        return prompt, [f" {choice}" for choice in question.choices]
    if len(question.choices) > len(_LETTERS):
        raise ValueError(
            f"question {question.id!r} has {len(question.choices)} choices; the letter format allows {len(_LETTERS)}. "
            "Use the cloze format."
        )
    letters = _LETTERS[: len(question.choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True))
    return f"Question: {question.question}\n{listed}Answer:", [f" {letter}" for letter in letters]


def check_fits(examples: Sequence[Encoded], *, vocab_size: int, max_positions: int) -> None:
    """Raises ValueError unless a model of so many tokens and positions can read every example."""
    for index, example in enumerate(examples):
        largest = max(itertools.chain(example.prefix, *example.branches))
        if largest >= vocab_size:
            raise ValueError(
                f"example {index} holds token {largest}; the model knows 0 to {vocab_size - 1}. The tokenizer belongs "
                "to another model: use the one that the model came with."
            )
        # The last token of a branch is predicted, not read.
        longest = len(example.prefix) + max(map(len, example.branches)) - 1
        if longest > max_positions:
            raise ValueError(
                f"example {index} takes {longest} positions; the model has {max_positions}. Shorten or remove it."
            )


def encode_all(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Question] | Sequence[Completion], prompt_format: str = "cloze"
) -> list[Encoded]:
    """All items as token numbers, tokenized in one batch.

    Prefixes begin with the beginning-of-sequence token where the tokenizer itself adds one (Llama does, SmolLM2
    does not). A question's branches have no end token: they are compared, not generated. A completion is a single
    branch, closed by the end-of-sequence token.

    Args:
        tokenizer: from `load_tokenizer`.
        items: questions, or completions (which have no format).
        prompt_format: `cloze` or `letter`.

    Raises:
        ValueError: unknown format; a completion where the tokenizer has no end-of-sequence token.
    """
    texts: list[str] = []
    shapes: list[tuple[int, int, tuple[int, ...]]] = []  # branches, answer, end of each branch
    for item in items:
        if isinstance(item, Completion):
            prompt, branches, answer, end = item.prompt, [item.completion], 0, (_end_token(tokenizer),)
        else:
            prompt, branches = format_question(item, prompt_format)
            answer, end = item.answer_index, ()
        texts += [prompt, *branches]
        shapes.append((len(branches), answer, end))

    begin = _begin_tokens(tokenizer)
    tokens = iter(_tokenize(tokenizer, texts))
    return [
        Encoded(begin + next(tokens), tuple(next(tokens) + end for _ in range(count)), answer)
        for count, answer, end in shapes
    ]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[int, ...]]:
    if not texts:
        return []
    # verbose=False: no warning about the model's length; batches check their own limit.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in batch["input_ids"]]


def _begin_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    first = tuple(tokenizer.encode("")[:1])
    return first if first == (tokenizer.bos_token_id,) else ()


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(
            "the tokenizer has no end-of-sequence token; completions need one to learn where to stop. "
            "Set tokenizer.eos_token to the token that ends a text."
        )
    return end
