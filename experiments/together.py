"""Cells that differ in numbers and seed alone, trained in one program by `stable_lora_jax.training.train_sweep`."""

import time
from collections.abc import Sequence
from typing import Any

from flax import nnx

from stable_lora_jax.data import TrainBatches
from stable_lora_jax.finetune import TrainConfig, load_base, load_training_examples, total_steps, update_rule
from stable_lora_jax.lora import inject_lora, lora_modules, save_adapter
from stable_lora_jax.models import Decoder
from stable_lora_jax.training import SweepPoint, make_loss, split_model, train_sweep

# What may differ within a group.
VARYING = {"learning_rate", "alpha", "lam", "ratio", "seed"}


def train_together(configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    """Trains all, leaves an adapter in each run directory, and returns seconds and stops of each, or how it failed."""
    start, first = time.perf_counter(), configs[0]
    examples = load_training_examples(first)
    batches = [
        TrainBatches(examples, batch_size=config.batch_size, seed=config.seed, max_length=config.max_length)
        for config in configs
    ]
    total = total_steps(first, batches[0].steps_per_epoch)
    graph, base = nnx.split(load_base(first.model, first.dtype, first.quantize))
    models = [_adapted(config, nnx.merge(graph, base)) for config in configs]
    parts = [split_model(model) for model in models]
    result = train_sweep(
        *(parts[0][0], parts[0][2], [adapters for _, adapters, _ in parts], batches),
        points=[_point(config, model) for config, model in zip(configs, models, strict=True)],
        make_optimizer=lambda point: update_rule(first, total, point.learning_rate, point.lam, point.ratio)[0],
        loss=make_loss(first.loss, max(len(example.branches) for example in examples)),
        total_steps=total,
    )
    seconds = round((time.perf_counter() - start) / len(configs), 1)
    outcomes: list[dict[str, Any]] = []
    for k, (config, model) in enumerate(zip(configs, models, strict=True)):
        if failed := int(result.failed_at[k]):
            outcomes.append({"failed": f"Step {failed} has a loss, gradient or update that is not finite."})
            continue
        nnx.update(model, result.adapters[k])
        save_adapter(config.directory / "adapter.safetensors", model, config.model)
        stable = {pair: at[k].ravel().tolist() for pair, at in result.stable_at.items()}
        outcomes.append({"train_seconds": seconds, "together": len(configs), "steps": total, "stable_at": stable})
    return outcomes


def _adapted(config: TrainConfig, model: Decoder) -> Decoder:
    return inject_lora(
        *(model, config.rank, config.alpha, config.targets),
        rngs=nnx.Rngs(config.seed),
        use_rslora=config.use_rslora,
        dropout=config.dropout,
    )


def _point(config: TrainConfig, model: Decoder) -> SweepPoint:
    scale = next(iter(lora_modules(model).values())).scale
    return SweepPoint(config.learning_rate, scale, config.lam, config.ratio)
