"""``stable-lora train``: fine-tune a model on a task, and leave a run directory that says everything about it."""

from stable_lora_jax.finetune import RunConfig, finetune
from stable_lora_jax.training import TrainResult, is_first


def train_command(config: RunConfig) -> TrainResult:
    """Runs `stable-lora train`, prints how it ended, and returns that; see `RunConfig`."""
    result = finetune(config)
    if not is_first():
        return result
    if result.stopped_by:
        name, total = result.stopped_by.name, result.total_steps
        print(f"Stopped by {name} at step {result.steps} of {total}; --resume continues from there.")
    else:
        told = "" if result.loss is None else f", last loss {result.loss:.4f}"  # none if it was finished before
        print(f"Trained {result.steps} steps{told}. Run and adapter: {config.directory}")
    return result
