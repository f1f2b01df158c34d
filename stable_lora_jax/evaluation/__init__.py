"""How good a model is at choosing answers."""

from stable_lora_jax.evaluation.likelihood import (
    Evaluation,
    branch_log_likelihoods,
    evaluate,
    target_log_likelihoods,
)

__all__ = ["Evaluation", "branch_log_likelihoods", "evaluate", "target_log_likelihoods"]
