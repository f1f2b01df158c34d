"""How good a model is at choosing answers and at finding numbers, and what a difference between two models means."""

from stable_lora_jax.extras import needs

with needs("train"):
    from stable_lora_jax.evaluation.exact_match import exact_match, final_number
    from stable_lora_jax.evaluation.likelihood import (
        Evaluation,
        NonFiniteScoreError,
        branch_log_likelihoods,
        evaluate,
        target_log_likelihoods,
    )
    from stable_lora_jax.evaluation.statistics import (
        Estimate,
        expected_best,
        holm,
        mean_interval,
        paired_bootstrap,
        paired_p_value,
        seeds_and_questions,
        sign_flip_p_value,
    )

__all__ = [
    "Estimate",
    "Evaluation",
    "NonFiniteScoreError",
    "branch_log_likelihoods",
    "evaluate",
    "exact_match",
    "expected_best",
    "final_number",
    "holm",
    "mean_interval",
    "paired_bootstrap",
    "paired_p_value",
    "seeds_and_questions",
    "sign_flip_p_value",
    "target_log_likelihoods",
]
