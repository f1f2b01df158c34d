"""Training of adapters: methods, losses, the step, and the loop around it."""

from stable_lora_jax.extras import needs

with needs("train"):
    from stable_lora_jax.training.checkpoints import CheckpointError, Checkpoints, checkpoints, newest_step
    from stable_lora_jax.training.compilation_cache import compilation_cache
    from stable_lora_jax.training.distributed import LostProcessError, is_first, join_processes, wait_for_all
    from stable_lora_jax.training.loggers import LOGGERS, check_logger, sign_in
    from stable_lora_jax.training.loop import NonFiniteLossError, TrainResult, check_intervals, train
    from stable_lora_jax.training.loss import LOSSES, Loss, make_loss
    from stable_lora_jax.training.methods import METHODS, SCHEDULES, learning_rate_schedule, make_optimizer
    from stable_lora_jax.training.metrics import MetricsFile, read_metrics, stop_steps
    from stable_lora_jax.training.run_directory import LostRunError, RunDirectory, run_labels
    from stable_lora_jax.training.sharding import make_mesh, parameter_sharding
    from stable_lora_jax.training.step import (
        Frozen,
        StepMetrics,
        TrainState,
        compile_step,
        init_state,
        join_model,
        split_model,
        suits_unrolling,
        train_step,
    )
    from stable_lora_jax.training.sweep import SweepPoint, SweepResult, compile_sweep_step, train_sweep
    from stable_lora_jax.training.validation import Validated, Validation

__all__ = [
    "LOGGERS",
    "LOSSES",
    "METHODS",
    "SCHEDULES",
    "CheckpointError",
    "Checkpoints",
    "Frozen",
    "Loss",
    "LostProcessError",
    "LostRunError",
    "MetricsFile",
    "NonFiniteLossError",
    "RunDirectory",
    "StepMetrics",
    "SweepPoint",
    "SweepResult",
    "TrainResult",
    "TrainState",
    "Validated",
    "Validation",
    "check_intervals",
    "check_logger",
    "checkpoints",
    "compilation_cache",
    "compile_step",
    "compile_sweep_step",
    "init_state",
    "is_first",
    "join_model",
    "join_processes",
    "learning_rate_schedule",
    "make_loss",
    "make_mesh",
    "make_optimizer",
    "newest_step",
    "parameter_sharding",
    "read_metrics",
    "run_labels",
    "sign_in",
    "split_model",
    "stop_steps",
    "suits_unrolling",
    "train",
    "train_step",
    "train_sweep",
    "wait_for_all",
]
