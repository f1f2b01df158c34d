"""``stable-lora train``: fine-tune a model on a task, and leave a run directory that says everything about it."""

from stable_lora_jax.cli.config_file import to_yaml
from stable_lora_jax.finetune import RunConfig, finetune
from stable_lora_jax.training import TrainResult, is_first


def train_command(config: RunConfig) -> TrainResult | None:
    """Runs `stable-lora train`, prints how it ended, and returns that; see `RunConfig`."""
    if config.run.print_config:
        print(to_yaml(config), end="")
        return None
    result = finetune(config)
    if not is_first():
        return result
    if result.stopped_by:
        name, total = result.stopped_by.name, result.total_steps
        print(f"Stopped by {name} at step {result.steps} of {total}; --resume continues from there.")
    else:
        told = "" if result.loss is None else f", last loss {result.loss:.4f}"  # none if it was finished before
        steps, total, best = result.steps, result.total_steps, result.best_step
        early = (
            "" if steps == total else f" of {total}, as {config.schedule.patience} validations brought nothing lower"
        )
        print(f"Trained {steps} steps{early}{told}. Run and adapter: {config.directory}")
        if best != steps:
            print(f"The adapter is that of step {best}, whose validation loss is the lowest.")
    return result
