"""``stable-lora generate``: answer or continue a text, or many from a file, with or without an adapter."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from stable_lora_jax.data import end_of_turn, has_chat_template, load_prompts, load_tokenizer, render_chat
from stable_lora_jax.finetune import base_of, load_with_adapter, quantization, record_of
from stable_lora_jax.locations import check_local
from stable_lora_jax.models import generate, stream

_BATCH = 8  # prompts of a file that are answered together


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answer or continue a prompt, printing tokens as they come; or the prompts of a file, a JSON line each."""

    prompt: str | None = None
    """What to say to the model, or the text that it is to continue."""
    prompts: Path | None = None
    """A file of prompts instead: one per line, or in a .jsonl file {"prompt": "..."} or {"messages": [...]} each."""
    model: str | None = None
    """The base model: an alias, a Hugging Face directory or hub name, or a .gguf file; the adapter's own if not given,
    smollm2-135m without one."""
    adapter: Path | None = None
    """A run directory, a PEFT directory or an adapter file."""
    form: Literal["chat", "raw"] | None = None
    """chat (said through the tokenizer's chat template) or raw (continued as it stands). If not given: for the adapter
    of a run as it was trained, else chat where the tokenizer has a template."""
    template: str | None = None
    """Which chat template, where the tokenizer has several; the one called default if not given."""
    max_new_tokens: int = 64
    """Stop after this many tokens, at the end of the text, or of the turn in a chat."""
    stop: tuple[str, ...] = ()
    """Stop before any of these texts."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model."""
    top_k: int | None = None
    """Sample from this many likeliest tokens only."""
    top_p: float | None = None
    """Sample from the fewest tokens only whose probabilities sum to this."""
    seed: int = 0
    """Of the sampling."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: Literal["int8", "nf4", "none"] | None = None
    """int8, nf4 or none; as the run was trained if not given, none without one."""

    def __post_init__(self):
        check_local(prompts=self.prompts)
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("Give --prompt with a text, or --prompts with a file.")
        if not all(self.stop):
            raise ValueError("stop holds an empty text, before which everything stops. Leave it out.")


def generate_command(config: GenerateConfig) -> None:
    """Runs `stable-lora generate`; see `GenerateConfig`."""
    prompts: list[Any] = [config.prompt] if config.prompts is None else load_prompts(config.prompts)
    base, quantize = base_of(config.model, config.adapter), quantization(config.quantize, config.adapter)
    tokenizer = load_tokenizer(base)
    model = load_with_adapter(base, config.adapter, config.dtype, quantize)
    record = record_of(config.adapter)
    chat = has_chat_template(tokenizer) and (not record or record.get("form") == "chat")
    if config.template is not None and config.form == "raw":
        raise ValueError("template names a chat template, and form='raw' uses none. Leave one of them out.")
    raw = config.form == "raw" or (config.form is None and config.template is None and not chat)
    if raw and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"{config.prompts} holds messages, which only a chat template makes a text of. Give --form chat."
        )
    key = jax.random.key(config.seed) if config.temperature > 0 else None
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    options |= {"top_k": config.top_k, "top_p": config.top_p}
    end: Any = tokenizer.eos_token_id
    ends: set[Any] = {end} if raw else {end, end_of_turn(tokenizer, config.template)}

    def encoded(prompt: Any) -> list[int]:
        if raw:
            return tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.encode(render_chat(tokenizer, messages, template=config.template), add_special_tokens=False)

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    if config.prompts is None:
        if raw:
            print(config.prompt, end="", flush=True)
        for text in _pieces(stream(model, encoded(prompts[0]), key=key, **options), ends, decoded, config.stop):
            print(text, end="", flush=True)
        print()
        return
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        of_batch = None if key is None else jax.random.fold_in(key, start)
        eos_id = end if isinstance(end, int) else None
        answers = generate(model, [encoded(prompt) for prompt in batch], eos_id=eos_id, key=of_batch, **options)
        for prompt, answer in zip(batch, answers, strict=True):
            name = "prompt" if isinstance(prompt, str) else "messages"
            text = "".join(_pieces(answer, ends, decoded, config.stop))
            print(json.dumps({name: prompt, "answer": text}, ensure_ascii=False), flush=True)


def _pieces(
    tokens: Iterable[int], ends: set[Any], decoded: Callable[[list[int]], str], stops: tuple[str, ...]
) -> Iterable[str]:
    """Yields the text of the tokens up to an end token or a text to stop before, as soon as it is sure."""
    told, ids, text = "", [], ""
    for token in tokens:
        if token in ends:
            break
        ids.append(token)
        text = decoded(ids)
        if found := [place for stop in stops if (place := text.find(stop)) >= 0]:
            text = text[: min(found)]
            break
        sure = text.rstrip("\ufffd")  # a character whose bytes are not all there yet
        kept = max((_overlap(sure, stop) for stop in stops), default=0)
        sure = sure[: len(sure) - kept]
        if len(sure) > len(told):
            yield sure[len(told) :]
            told = sure
    yield text[len(told) :]


def _overlap(text: str, stop: str) -> int:
    """Returns how many last characters of a text may be the beginning of one to stop before."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
