"""Cells that differ in numbers and seed alone, trained in one program by `stable_lora_jax.training.train_sweep`."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax
from flax import nnx

from experiments.running.shared import shared_base, shared_examples
from stable_lora_jax.evaluation import NonFiniteScoreError
from stable_lora_jax.finetune import (
    RunConfig,
    inject_adapters,
    load_validation,
    total_steps,
    training_batches,
    update_rule,
)
from stable_lora_jax.lora import lora_modules, save_adapter
from stable_lora_jax.models import Decoder
from stable_lora_jax.training import RunDirectory, SweepPoint, Validation, make_loss, split_model, train_sweep

# What may differ within a group.
VARYING = {"learning_rate", "alpha", "lam", "ratio", "weight_decay", "a_scale", "seed"}


@dataclass
class _Validated:
    """What the validations of a run said: lines for its metrics, and the adapters of the least loss with that loss."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    least: float = math.inf
    adapters: Any = None


def train_together(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Trains all, leaves an adapter in each run directory, and returns seconds and stops of each, or how it failed."""
    start, first = time.perf_counter(), configs[0]
    if first.schedule.patience is not None:
        raise ValueError("Runs that end by their validation are not trained together. Leave --together out.")
    examples = shared_examples(first.model, first.data)
    batches = [training_batches(config, examples) for config in configs]
    total = total_steps(first, batches[0].steps_per_epoch)
    models = [inject_adapters(shared_base(first.model), config.adapter, config.schedule.seed) for config in configs]
    parts = [split_model(model) for model in models]
    validation, validated = load_validation(first), [_Validated() for _ in configs]

    def watch(step: int, adapters: Any) -> None:
        assert validation is not None
        for k, (model, found) in enumerate(zip(models, validated, strict=True)):
            _validate(step, jax.tree.map(lambda x, k=k: x[k], adapters), model, validation, found)

    result = train_sweep(
        *(parts[0][0], parts[0][2], [adapters for _, adapters, _ in parts], batches),
        points=[_point(config, model) for config, model in zip(configs, models, strict=True)],
        make_optimizer=lambda point: _rule(first, total, point),
        loss=make_loss(first.data.loss, max(len(example.branches) for example in examples)),
        total_steps=total,
        **({"watch": watch, "every": validation.every} if validation else {}),
    )
    seconds = round((time.perf_counter() - start) / len(configs), 1)
    outcomes: list[dict[str, Any]] = []
    for k, (config, model) in enumerate(zip(configs, models, strict=True)):
        if failed := int(result.failed_at[k]):
            outcomes.append({"failed": f"Step {failed} has a loss, gradient or update that is not finite."})
            continue
        directory, best = RunDirectory(config.directory), validated[k].adapters if config.run.keep_best else None
        nnx.update(model, result.adapters[k] if best is None else best)
        save_adapter(directory.adapter, model, config.model.name)
        directory.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in validated[k].lines))
        stable = {pair: at[k].ravel().tolist() for pair, at in result.stable_at.items()}
        outcomes.append({"train_seconds": seconds, "together": len(configs), "steps": total, "stable_at": stable})
    return outcomes


def _validate(step: int, adapters: Any, model: Decoder, validation: Validation, found: _Validated) -> None:
    """Notes what a model with these adapters scores; nothing where a score is not finite, as that run has failed."""
    nnx.update(model, adapters)
    try:
        measured = validation.measure(model)
    except NonFiniteScoreError:
        return
    told = {name: value for name, value in measured._asdict().items() if value is not None}
    found.lines.append({"step": step, "validation": told})
    if measured.loss < found.least:
        found.least, found.adapters = measured.loss, jax.device_get(adapters)


def _rule(config: RunConfig, total: int, point: SweepPoint) -> optax.GradientTransformation:
    own = {"lam": point.lam, "ratio": point.ratio}
    lam, ratio = (value if getattr(config.method, name) is not None else None for name, value in own.items())
    return update_rule(config, total, point.learning_rate, lam, ratio, point.weight_decay)[0]


def _point(config: RunConfig, model: Decoder) -> SweepPoint:
    scale, *others = {module.scale for module in lora_modules(model).values()}
    if others:
        raise ValueError("Modules of different scales are not trained together. Leave --together out.")
    own = {name: value for name in ("lam", "ratio") if (value := getattr(config.method, name)) is not None}
    return SweepPoint(config.schedule.learning_rate, scale, weight_decay=config.method.weight_decay, **own)
