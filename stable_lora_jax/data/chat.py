"""Conversations as text, by the chat template that a tokenizer comes with.

A template is a small program from outside. Whatever it does wrong ends in one message that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplateError(ValueError):
    """A tokenizer has no such chat template, or the template fails."""


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer comes with a chat template."""
    return bool(tokenizer.chat_template)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> str:
    """Returns the conversation as the text that the model was trained on, special tokens included.

    Args:
      tokenizer: from `load_tokenizer`.
      messages: `{"role": ..., "content": ...}` each.
      template: which of several named templates; None takes the only one, or the one called "default".
      tools: descriptions of functions that the assistant may call.
      add_generation_prompt: whether the text ends where the assistant begins to speak.

    Raises:
      ChatTemplateError: no template, none of that name, several and none chosen, or one that fails or gives no text.
    """
    source = chosen_template(tokenizer, template)
    called = f"the chat template{f' {template!r}' if template else ''} of {tokenizer.name_or_path or 'the tokenizer'}"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template may raise anything
        raise ChatTemplateError(
            f"{called} fails: {type(error).__name__}: {str(error).strip() or 'no reason given'}. Correct the template, "
            "or give the text as it should be instead of a conversation."
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise ChatTemplateError(
            f"{called} gives {text!r} instead of a text. Correct the template, or give the text as it should be "
            "instead of a conversation."
        )
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> int | None:
    """Returns the special token that ends what the assistant says, None if the template has none; see `render_chat`."""
    said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text = render_chat(tokenizer, said, template=template, add_generation_prompt=False)
    behind = tokenizer.encode(text[text.rindex("2") + 1 :], add_special_tokens=False) if "2" in text else []
    has_added: Any = tokenizer
    special = {*tokenizer.all_special_ids, *has_added.get_added_vocab().values()}
    return behind[0] if behind and behind[0] in special else None


def chosen_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """Returns the source of a tokenizer's chat template; arguments and errors as in `render_chat`."""
    templates = tokenizer.chat_template
    if not templates:
        raise ChatTemplateError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template. Give the text as it should be instead "
            "of a conversation."
        )
    named = templates if isinstance(templates, dict) else {"default": templates}
    name = template or ("default" if "default" in named else None)
    if name is None or name not in named:
        asked = f"no chat template {template!r}" if template else "several chat templates and none is called 'default'"
        raise ChatTemplateError(f"the tokenizer has {asked}; it has {', '.join(map(repr, named))}. Name one of these.")
    return named[name]
