"""``stable-lora eval``: accuracy and likelihood of a model, with or without an adapter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stable_lora_jax.data import (
    PROMPT_FORMATS,
    TASKS,
    Question,
    digest,
    encode_all,
    load_hub,
    load_jsonl,
    load_task,
    load_tokenizer,
    parse_columns,
)
from stable_lora_jax.evaluation import Evaluation, evaluate
from stable_lora_jax.finetune import (
    DTYPES,
    RunConfig,
    base_of,
    check_choice,
    check_data,
    given_or_trained,
    load_training_examples,
    load_with_adapter,
    quantization,
    record_of,
    training_items,
)
from stable_lora_jax.locations import check_local


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Score the choices of a task's questions and print accuracy and likelihood."""

    model: str | None = None
    """The base model: an alias, a Hugging Face directory or hub name, or a .gguf file; the adapter's own if not given,
    smollm2-135m without one."""
    adapter: Path | None = None
    """A run directory, a PEFT directory or an adapter file; the base model alone if not given."""
    data: str = "arc_easy"
    """A task (arc_easy, arc_challenge, openbookqa, social_iqa, hellaswag), a .jsonl file of questions, or
    hub:OWNER/NAME."""
    map: str | None = None
    """Of a data set of the hub: which column is which field, e.g. question=sentence,choices=options; as the run was
    trained if not given and it was trained on that data set."""
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
        check_local(output=self.output)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if self.prompt_format is not None:
            check_choice("prompt_format", self.prompt_format, PROMPT_FORMATS)
        check_data(self.data, self.map or "", self.source)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} is below 1. Leave it out to score every question.")


def eval_command(config: EvalConfig) -> Evaluation:
    """Runs `stable-lora eval` and returns the scores; see `EvalConfig`."""
    if config.split == "holdout":
        items = _held_out(config)
    elif config.data in TASKS:
        items = load_task(config.data, config.split, source=config.source)
    elif config.data.startswith("hub:"):
        items = load_hub(config.data, config.split, parse_columns(_columns(config)))
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


def _columns(config: EvalConfig) -> str:
    """Returns the columns as given, or those that the adapter's run took of the same data set."""
    trained = RunConfig.from_record(record_of(config.adapter).get("config", {})).data
    as_trained = trained.map if trained.name == config.data else ""
    return as_trained if config.map is None else config.map


def _held_out(config: EvalConfig) -> list[Any]:
    """Returns what the adapter's run kept out of training."""
    record = record_of(config.adapter)
    trained = RunConfig.from_record(record.get("config", {}))
    if not trained.data.holdout:
        raise ValueError(
            "split='holdout' asks for what a run kept out of training, and there is no run that did. Give --adapter "
            "with the directory of one that was trained with --holdout, or another --split."
        )
    if config.data != trained.data.name:
        raise ValueError(
            f"split='holdout' is of the run's own data: give --data {trained.data.name}, not {config.data}."
        )
    for option in ("map", "source"):
        given, used = getattr(config, option), getattr(trained.data, option)
        if given not in (None, getattr(EvalConfig, option), used):
            raise ValueError(
                f"split='holdout' reads the run's data as the run did, with {option}={used!r}, not {given!r}. Leave "
                f"--{option} out."
            )
    if digest(load_training_examples(trained)) != record["examples_sha256"]:
        raise ValueError(
            f"{config.data} is not as it was when {config.adapter} was trained, so that what was kept out cannot be "
            "told. Give the data of that time."
        )
    return training_items(trained)[1]
