"""Conversations as token numbers, of which the assistant's are learnt.

The text is what the chat template makes of the whole conversation. Which of it is the assistant's, the template itself
says where it marks it (`{% generation %}`, as transformers reads it). Any other template is asked: a turn begins where
the text of the messages before it ends when the template lets the assistant begin to speak, and ends where the text of
the messages up to it ends. So the end-of-turn token is learnt, with the white space behind it, and the header in front
of a turn is not. Templates that tell a turn otherwise once another one follows (Qwen3 drops its thoughts) are compared
with the whole text; what does not fit is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stable_lora_jax.data.chat import ChatTemplateError, chosen_template, render_chat
from stable_lora_jax.data.jsonl import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Parts(NamedTuple):
    """What an `Encoded` is made of: see there."""

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    answer: int
    moved: bool
    learnt: tuple[bool, ...]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Conversation], template: str | None = None
) -> Iterator[Parts]:
    """Yields each conversation's tokens up to the last that is learnt, and which are.

    Args:
      tokenizer: from `load_tokenizer`; it must be able to tell which characters a token covers.
      items: the conversations.
      template: which chat template, where there are several.

    Raises:
      ValueError: a tokenizer that cannot tell; a conversation of which nothing is learnt, or whose turns do not stand
        in its text as they do alone.
      ChatTemplateError: see `render_chat`.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path or ''} cannot tell which characters its tokens cover, which "
            "conversations need. Give the model's tokenizer.json."
        )
    marked = bool(_MARKED.search(chosen_template(tokenizer, template)))
    for item in items:
        try:
            tokens, learnt = (_by_marks if marked else _by_turns)(tokenizer, item, template)
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{_called(item)}: {error}") from error
        first = next((index for index, each in enumerate(learnt) if each), len(learnt))
        last = len(learnt) - next((index for index, each in enumerate(reversed(learnt)) if each), 0)
        if first == len(learnt):
            raise ValueError(f"{_called(item)}: no token of its text is the assistant's. Correct or remove it.")
        if first == 0:
            raise ValueError(f"{_called(item)}: its first token is learnt, and nothing predicts it. Put a turn before.")
        yield Parts(tokens[:first], (tokens[first:last],), 0, False, learnt[first:last])


def _by_marks(
    tokenizer: PreTrainedTokenizerBase, item: Conversation, template: str | None
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Returns the tokens, and which of them the template marks as generated."""
    render_chat(tokenizer, item.messages, template=template, tools=item.tools, add_generation_prompt=False)
    found: Any = tokenizer.apply_chat_template(
        [dict(message) for message in item.messages],
        tools=list(item.tools) or None,
        chat_template=chosen_template(tokenizer, template),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return tuple(found["input_ids"]), tuple(map(bool, found["assistant_masks"]))


def _by_turns(
    tokenizer: PreTrainedTokenizerBase, item: Conversation, template: str | None
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Returns the tokens, and which of them lie in a turn of the assistant's, wholly or in part."""

    def render(count: int, begin: bool) -> str:
        messages = item.messages[:count]
        return render_chat(tokenizer, messages, template=template, tools=item.tools, add_generation_prompt=begin)

    text = render(len(item.messages), False)
    spans = []
    for index, message in enumerate(item.messages):
        if message["role"] == "assistant":
            begun = render(index, True) if index else _before_the_first(text, message)
            ended = render(index + 1, False)
            if ended != text:  # Phi-3 ends every text by this token, and no turn
                ended = ended.removesuffix(str(tokenizer.eos_token))
            span = _turn(text, begun, ended, message)
            if span is None:
                raise ValueError(
                    f"{_called(item)}: message {index} does not stand in the text of the whole conversation as it does "
                    "alone, so what of it the assistant says cannot be told. Give a chat template that marks it by "
                    "{% generation %}, or remove the conversation."
                )
            spans.append(span)
    coded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = tuple(any(a < last and b > first for first, last in spans) for a, b in coded["offset_mapping"])
    return tuple(coded["input_ids"]), learnt


def _before_the_first(text: str, message: dict[str, Any]) -> str:
    """Returns what stands before a conversation's first message, where that is the assistant's."""
    return text[: max(0, text.find((message.get("content") or "").strip()))]


def _turn(text: str, begun: str, ended: str, message: dict[str, Any]) -> tuple[int, int] | None:
    """Returns the first character of a turn, and the first behind it; None if it cannot be told.

    Args:
      text: of the whole conversation.
      begun: up to where the assistant speaks.
      ended: up to the end of the turn.
      message: the turn.
    """
    if not text.startswith(begun) or not ended.startswith(begun):
        return None
    # What the template says in front of a turn alone is left out: the longest end of it that stands in the text too.
    alone, said = ended[len(begun) :], (message.get("content") or "").strip()
    kept = next((alone[cut:] for cut in range(len(alone)) if text.startswith(alone[cut:], len(begun))), "")
    if said not in kept or (not said and kept != alone and not _names(message, kept)):
        return None
    return len(begun), len(begun) + len(kept)


def _names(message: dict[str, Any], text: str) -> bool:
    """Returns whether a text names the functions that a message calls."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return bool(functions) and all(str(function.get("name")) in text for function in functions)


def _called(item: Conversation) -> str:
    return f"conversation {item.id!r}" if item.id else "a conversation"
