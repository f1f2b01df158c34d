"""Cells that differ in numbers and seed alone, trained in one program by `stable_lora_jax.training.train_sweep`."""

import time
from collections.abc import Sequence
from typing import Any

import optax
from flax import nnx

from experiments.running.shared import shared_base, shared_examples
from stable_lora_jax.finetune import (
    RunConfig,
    inject_adapters,
    total_steps,
    training_batches,
    update_rule,
)
from stable_lora_jax.lora import lora_modules, save_adapter
from stable_lora_jax.models import Decoder
from stable_lora_jax.training import RunDirectory, SweepPoint, make_loss, split_model, train_sweep

# What may differ within a group.
VARYING = {"learning_rate", "alpha", "lam", "ratio", "weight_decay", "a_scale", "seed"}


def train_together(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Trains all, leaves an adapter in each run directory, and returns seconds and stops of each, or how it failed."""
    start, first = time.perf_counter(), configs[0]
    if first.schedule.eval_every is not None:
        raise ValueError("Runs that validate while they train are not trained together. Leave --together out.")
    examples = shared_examples(first.model, first.data)
    batches = [training_batches(config, examples) for config in configs]
    total = total_steps(first, batches[0].steps_per_epoch)
    models = [inject_adapters(shared_base(first.model), config.adapter, config.schedule.seed) for config in configs]
    parts = [split_model(model) for model in models]
    result = train_sweep(
        *(parts[0][0], parts[0][2], [adapters for _, adapters, _ in parts], batches),
        points=[_point(config, model) for config, model in zip(configs, models, strict=True)],
        make_optimizer=lambda point: _rule(first, total, point),
        loss=make_loss(first.data.loss, max(len(example.branches) for example in examples)),
        total_steps=total,
    )
    seconds = round((time.perf_counter() - start) / len(configs), 1)
    outcomes: list[dict[str, Any]] = []
    for k, (config, model) in enumerate(zip(configs, models, strict=True)):
        if failed := int(result.failed_at[k]):
            outcomes.append({"failed": f"Step {failed} has a loss, gradient or update that is not finite."})
            continue
        nnx.update(model, result.adapters[k])
        save_adapter(RunDirectory(config.directory).adapter, model, config.model.name)
        stable = {pair: at[k].ravel().tolist() for pair, at in result.stable_at.items()}
        outcomes.append({"train_seconds": seconds, "together": len(configs), "steps": total, "stable_at": stable})
    return outcomes


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
