"""``stable-lora generate``: answer or continue a text, with or without an adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from stable_lora_jax.data import has_chat_template, load_tokenizer, render_chat
from stable_lora_jax.finetune import base_of, load_with_adapter, quantization, record_of
from stable_lora_jax.models import stream


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answer or continue a prompt, printing tokens as they come."""

    prompt: str
    """What to say to the model, or the text that it is to continue."""
    model: str | None = None
    """The base model: an alias, a Hugging Face directory or hub name, or a .gguf file; the adapter's own if not given,
    smollm2-135m without one."""
    adapter: Path | None = None
    """A run directory, a PEFT directory or an adapter file."""
    form: Literal["chat", "raw"] | None = None
    """chat (said through the tokenizer's chat template) or raw (continued as it stands). If not given: raw for the
    adapter of a run, as runs train on plain text; else chat where the tokenizer has a template."""
    template: str | None = None
    """Which chat template, where the tokenizer has several; the one called default if not given."""
    max_new_tokens: int = 64
    """Stop after this many tokens, or at the end-of-sequence token."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model."""
    seed: int = 0
    """Of the sampling."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: Literal["int8", "nf4", "none"] | None = None
    """int8, nf4 or none; as the run was trained if not given, none without one."""


def generate_command(config: GenerateConfig) -> None:
    """Runs `stable-lora generate`; see `GenerateConfig`."""
    base, quantize = base_of(config.model, config.adapter), quantization(config.quantize, config.adapter)
    tokenizer = load_tokenizer(base)
    model = load_with_adapter(base, config.adapter, config.dtype, quantize)
    end = tokenizer.eos_token_id
    chat = has_chat_template(tokenizer) and not record_of(config.adapter)
    if config.template is not None and config.form == "raw":
        raise ValueError("template names a chat template, and form='raw' uses none. Leave one of them out.")
    if config.form == "raw" or (config.form is None and config.template is None and not chat):
        print(config.prompt, end="", flush=True)
        prompt = tokenizer.encode(config.prompt)
    else:
        text = render_chat(tokenizer, [{"role": "user", "content": config.prompt}], template=config.template)
        prompt = tokenizer.encode(text, add_special_tokens=False)
    tokens = stream(
        model,
        prompt,
        max_new_tokens=config.max_new_tokens,
        eos_id=end if isinstance(end, int) else None,
        temperature=config.temperature,
        key=jax.random.key(config.seed) if config.temperature > 0 else None,
    )
    told, ids = "", []
    for token in tokens:
        ids.append(token)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(told) :], end="", flush=True)
            told = text
    print()
