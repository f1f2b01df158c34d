"""What the cells of a process share and load once: base weights, training data, questions, and programs that score.

On two cores HellaSwag's 40,000 training questions take a minute to become tokens: more than their training on a GPU,
where compiling is the rest of the time. So adapters of every s are scored by the same programs, and by few of them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from stable_lora_jax.data import Encoded, Question, encode_all, load_jsonl, load_task, load_tokenizer
from stable_lora_jax.evaluation import Evaluation, evaluate
from stable_lora_jax.finetune import (
    DataConfig,
    ModelConfig,
    RunConfig,
    load_base,
    load_training_examples,
    load_with_adapter,
    training_items,
)
from stable_lora_jax.lora import lora_modules
from stable_lora_jax.models import Decoder

_TOKENS = 16384  # of a batch that an accelerator scores: a quarter of the programs and an eighth of the batches of 2048


def shared_base(config: ModelConfig) -> Decoder:
    """Returns a base model of its own to put an adapter into; its weights are loaded once in a process."""
    return nnx.merge(*_split_base(config.name, config.dtype, config.quantize))


@functools.lru_cache(maxsize=1)
def _split_base(name: str, dtype: str, quantize: str | None) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(load_base(name, dtype, quantize))


def trained_model(config: ModelConfig, directory: Path) -> Decoder:
    """Returns the base with the adapter of a run directory, ready to be scored.

    α is a static number of the model. Its power of two is multiplied into B, which changes no bit of any output and
    leaves one structure, and so one program, to adapters of s = 2 and of s = 16.
    """
    model = load_with_adapter(config.name, directory, config.dtype, config.quantize, shared_base(config))
    for module in lora_modules(model).values():
        module.alpha, exponent = math.frexp(module.alpha)
        module.lora_b[...] *= 2.0**exponent
    return model


def scored(model: Decoder, examples: Sequence[Encoded]) -> Evaluation:
    """Returns the scores of every choice of every example, in batches that suit the device."""
    if jax.default_backend() == "cpu":
        return evaluate(model, examples)
    return evaluate(model, examples, max_tokens=_TOKENS)


def right_answers(found: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Returns the summed log p and the tokens of each question's right answer."""
    answers = zip(found.log_likelihood, found.num_tokens, found.answer, strict=True)
    log_p, tokens = zip(*((sums[a], counts[a]) for sums, counts, a in answers), strict=True)
    return np.array(log_p), np.array(tokens)


@functools.lru_cache(maxsize=1)
def shared_examples(model: ModelConfig, data: DataConfig) -> list[Encoded]:
    """Returns what is trained on as token numbers."""
    return load_training_examples(RunConfig(model=model, data=replace(data, validation=None)))


def questions(data: DataConfig, score_on: str) -> list[Question]:
    """Returns the questions of a split of what is trained on, of "holdout", or of a .jsonl file."""
    if score_on.endswith((".jsonl", ".jsonl.gz")):
        items = load_jsonl(score_on)
    elif score_on == "holdout":
        _, items = training_items(RunConfig(data=replace(data, validation=None)))
    else:
        items = load_task(data.name, score_on, source=data.source)
    return [item for item in items if isinstance(item, Question)]


@functools.lru_cache(maxsize=2)
def shared_questions(model: str, data: DataConfig, score_on: str) -> list[Encoded]:
    """Returns `questions` as token numbers."""
    return encode_all(load_tokenizer(model), questions(data, score_on), data.prompt_format)
