"""Questions and completions as token numbers: a shared prefix and one branch per answer.

The tokens are always those of the joined text, prompt + answer, for every kind of tokenizer: a model is taught, scored
and asked the same text. Where tokenizing the prompt alone gives the first tokens of the joined text, these are the
prefix. Byte-level BPE cuts before a space anyway, so this holds for all five tasks. Where it does not hold, a token
spans the boundary or the prompt is cut differently in context ("The tr" + "ee is big" gives "▁The", "▁tree", ...).
The rule is then: the prefix ends where the last token ends that lies within the prompt, and the answer begins with the
token that spans the boundary. The branches of one question share one prefix, so it ends where the first of them needs
it to.
Only where this would leave no token to predict from, prompt and answer are cut apart at the boundary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stable_lora_jax.data.conversations import encode_conversations
from stable_lora_jax.data.jsonl import Completion, Conversation
from stable_lora_jax.data.prompts import format_question
from stable_lora_jax.data.tasks import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these before an answer keeps a tokenizer from treating it as the beginning of a text.
_BEFORE_AN_ANSWER = (".", "\n", "=", "x", "0")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token numbers of one question or completion.

    Args:
      prefix: what every answer shares, at least one token (it predicts the first token of each branch).
      branches: the answers, at least one, each of at least one token.
      answer: index of the right branch.
      moved: whether the branches begin before the answer's text does, as a token spans the boundary.
      learnt: which tokens of the only branch are learnt, where others stand between them, as in a conversation; None:
        all are.

    Raises:
      ValueError: an empty prefix or branch, no branch, or an answer that is not a branch.
    """

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    answer: int
    moved: bool = dataclasses.field(default=False, compare=False)
    learnt: tuple[bool, ...] | None = None

    def __post_init__(self):
        if self.learnt is not None:
            if len(self.branches) != 1 or len(self.learnt) != len(self.branches[0]) or not any(self.learnt):
                raise ValueError(
                    f"got learnt={self.learnt!r} for branches of {[len(branch) for branch in self.branches]} tokens; "
                    "it says of each token of a single branch whether it is learnt, and one must be. Correct it."
                )
            if all(self.learnt):
                object.__setattr__(self, "learnt", None)
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
    def target_counts(self) -> tuple[int, ...]:
        """Predicted tokens of each branch."""
        return tuple(map(len, self.branches)) if self.learnt is None else (sum(self.learnt),)

    @property
    def num_targets(self) -> int:
        """Predicted tokens: those of all branches."""
        return sum(self.target_counts)


def right_branch_only(encoded: Encoded) -> Encoded:
    """Returns the same example with the right answer as its only branch, for training on the answer's tokens."""
    return Encoded(encoded.prefix, (encoded.branches[encoded.answer],), 0, learnt=encoded.learnt)


def digest(examples: Sequence[Encoded]) -> str:
    """Returns the SHA-256 of the examples, in their order: of another number, token or answer it is another."""
    total = hashlib.sha256()
    for example in examples:
        for numbers in ((len(example.branches), example.answer), example.prefix, *example.branches):
            total.update(array("q", (len(numbers), *numbers)))
        if example.learnt is not None:
            total.update(array("q", example.learnt))
    return total.hexdigest()


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
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Question] | Sequence[Completion] | Sequence[Conversation],
    prompt_format: str = "cloze",
    template: str | None = None,
) -> list[Encoded]:
    """Returns all items as token numbers, tokenized in one batch (see the module for where a prefix ends).

    Of conversations, which are texts by a chat template, the assistant's tokens are learnt; see `conversations`.

    Prefixes begin with the beginning-of-sequence token where the tokenizer itself adds one (Llama does, SmolLM2
    does not). A question's branches have no end token: they are compared, not generated. A completion is a single
    branch, closed by the end-of-sequence token. Neither token is added to a text that has it already.

    Args:
      tokenizer: from `load_tokenizer`.
      items: questions, completions (which have no format), or conversations.
      prompt_format: `cloze` or `letter`.
      template: the chat template of conversations, where the tokenizer has several.

    Raises:
      ValueError: unknown format; an empty prompt or completion; a prompt of which nothing is left for a prefix; a
        completion where the tokenizer has no end-of-sequence token.
    """
    conversations = [item for item in items if isinstance(item, Conversation)]
    if conversations:
        return [Encoded(*found) for found in encode_conversations(tokenizer, conversations, template)]
    others = [item for item in items if not isinstance(item, Conversation)]
    texts = [
        (item.prompt, [item.completion]) if isinstance(item, Completion) else format_question(item, prompt_format)
        for item in others
    ]
    for item, (prompt, answers) in zip(others, texts, strict=True):
        if not prompt or not all(answers):
            raise ValueError(
                f"{_called(item)} has the prompt {prompt!r} and the answers {answers!r}; each needs a text of at least "
                "one character. Correct or remove it."
            )
    alone = _tokenize(tokenizer, [prompt for prompt, _ in texts])
    joined = iter(_tokenize(tokenizer, [prompt + answer for prompt, answers in texts for answer in answers]))
    begin = _begin_tokens(tokenizer)
    encoded = []
    for item, (prompt, answers), (prompt_tokens, _) in zip(others, texts, alone, strict=True):
        rows = [next(joined) for _ in answers]
        shared = _shared_prefix(rows, prompt_tokens, len(prompt))
        prefix, branches = rows[0][0][:shared], [tokens[shared:] for tokens, _ in rows]
        if prefix[: len(begin)] != begin:
            prefix = begin + prefix
        if not prefix:
            prefix, branches = prompt_tokens, [_cut(tokenizer, prompt, prompt_tokens, answer) for answer in answers]
        if not prefix or not all(branches):
            raise ValueError(
                f"{_called(item)} has the prompt {prompt!r} and the answers {answers!r}, which the tokenizer cannot "
                "tell apart: no token is left on one side. Give a longer prompt or answer, or remove it."
            )
        if isinstance(item, Completion):
            end = _end_token(tokenizer)
            branches = [branch if branch[-1] == end else (*branch, end) for branch in branches]
        answer = 0 if isinstance(item, Completion) else item.answer_index
        encoded.append(Encoded(prefix, tuple(branches), answer, moved=prompt_tokens != rows[0][0][:shared]))
    return encoded


def _shared_prefix(
    rows: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, int]] | None]], prompt: tuple[int, ...], length: int
) -> int:
    """Returns how many first tokens all rows share that lie within the prompt.

    Args:
      rows: tokens of each joined text, and the characters (first, last + 1) that each token covers, where known.
      prompt: tokens of the prompt alone.
      length: characters of the prompt.
    """
    ends = []
    for tokens, spans in rows:
        if tokens[: len(prompt)] == prompt:
            ends.append(len(prompt))
        elif spans is not None:
            ends.append(sum(1 for _ in itertools.takewhile(lambda span: span[1] <= length, spans)))
        else:
            ends.append(_common([tokens, prompt]))
    return min(*ends, _common([tokens for tokens, _ in rows]))


def _cut(tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: tuple[int, ...], answer: str) -> tuple[int, ...]:
    """Returns tokens of `answer` that continue those of the prompt to exactly the joined text, or ()."""
    for before in _BEFORE_AN_ANSWER:
        ((begun, _), (joined, _)) = _tokenize(tokenizer, [before, before + answer])
        tail = joined[len(begun) :]
        if joined[: len(begun)] == begun and tokenizer.decode([*tokens, *tail]) == prompt + answer:
            return tail
    return ()


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """Returns how many first tokens all rows have in common."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _called(item: Question | Completion) -> str:
    kind = type(item).__name__.lower()
    return f"{kind} {item.id!r}" if item.id else f"a {kind}"


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[tuple[tuple[int, ...], Sequence[tuple[int, int]] | None]]:
    """Returns the tokens of each text, and the characters of each token where the tokenizer can tell."""
    if not texts:
        return []
    # verbose=False: no warning about the model's length; batches check their own limit.
    fast = bool(tokenizer.is_fast)
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=fast,
        verbose=False,
    )
    spans = batch["offset_mapping"] if fast else itertools.repeat(None)
    return [(tuple(ids), each) for ids, each in zip(batch["input_ids"], spans, strict=False)]


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
