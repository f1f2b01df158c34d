"""``stable-lora eval``: accuracy and likelihood of a model, with or without an adapter."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flax import nnx

from stable_lora_jax.cli.train import DTYPES, known, known_data, load_base
from stable_lora_jax.data import TASKS, Question, check_fits, encode_all, load_jsonl, load_task, load_tokenizer
from stable_lora_jax.evaluation import Evaluation, evaluate
from stable_lora_jax.lora import inject_lora, inject_peft, load_adapter, read_adapter_spec
from stable_lora_jax.models import Decoder, huggingface_module

# The names under which others know what an alias of ours stands for.
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Score the choices of a task's questions and print accuracy and likelihood."""

    model: str = "smollm2-135m"
    """The base model: an alias, a Hugging Face directory or hub name, or a .gguf file."""
    adapter: Path | None = None
    """A run directory, a PEFT directory or an adapter file; the base model alone if not given."""
    data: str = "arc_easy"
    """A task (arc_easy, arc_challenge, openbookqa, social_iqa, hellaswag) or a .jsonl file of questions."""
    split: str = "validation"
    """train, validation or test."""
    source: Literal["wheel", "hub"] = "wheel"
    """wheel or hub."""
    prompt_format: str = "cloze"
    """cloze or letter."""
    limit: int | None = None
    """Score only this many questions, spread evenly over the data."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: Literal["int8", "nf4"] | None = None
    """int8 or nf4, as the adapter was trained; neither if not given."""
    output: Path | None = None
    """Write the figures to this JSON file too."""

    def __post_init__(self):
        known("dtype", self.dtype, tuple(DTYPES))
        known_data(self.data)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} is below 1. Leave it out to score every question.")


def eval_command(config: EvalConfig) -> Evaluation:
    """Runs `stable-lora eval` and returns the scores; see `EvalConfig`."""
    items = load_task(config.data, config.split, source=config.source) if config.data in TASKS else None
    items = load_jsonl(config.data) if items is None else items
    questions = [item for item in items if isinstance(item, Question)]
    if not questions:
        raise ValueError(f"{config.data} holds completions; eval needs questions with choices and answer_index.")
    count = min(config.limit or len(questions), len(questions))
    questions = [questions[i * len(questions) // count] for i in range(count)]
    examples = encode_all(load_tokenizer(config.model), questions, config.prompt_format)
    if config.output:
        config.output.open("a").close()  # a place that cannot be written shows before the work is done
    model = load_with_adapter(config.model, config.adapter, config.dtype, config.quantize)
    check_fits(examples, vocab_size=model.config.vocab_size, max_positions=model.config.max_positions)
    scores = evaluate(model, examples, progress=True)
    print(json.dumps(scores.summary(), indent=2))
    if config.output:
        config.output.write_text(json.dumps(scores.summary(), indent=2) + "\n")
    return scores


def load_with_adapter(name: str, adapter: Path | None, dtype: str = "float32", quantize: str | None = None) -> Decoder:
    """Returns a base model, with the adapter of a run directory, a PEFT directory or a file if one is given.

    Raises:
      ValueError: an adapter that belongs to another base model; an unknown dtype or quantization.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Known: {', '.join(DTYPES)}.")
    if adapter is None:
        return load_base(name, dtype, quantize)
    file = adapter / "adapter.safetensors" if adapter.is_dir() else adapter
    if (adapter / "adapter_config.json").is_file():
        model = load_base(name, dtype, quantize)
        count = inject_peft(adapter, model, HUB_NAMES.get(name, name), huggingface_module)
        print(f"{adapter}: filled {count} modules", file=sys.stderr)
        return model
    spec = read_adapter_spec(file)
    model = load_base(name, dtype, quantize)
    inject_lora(model, spec.rank, spec.alpha, spec.targets, rngs=nnx.Rngs(0), use_rslora=spec.use_rslora)
    load_adapter(file, model, name)
    return model
