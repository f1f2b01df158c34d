"""Validation while training: loss and accuracy on examples that are not trained on, and when to stop by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stable_lora_jax.data import Encoded
from stable_lora_jax.evaluation import evaluate


class Validated(NamedTuple):
    """What was measured.

    Attributes:
      loss: the training loss on these examples, nats; of `answer` per token, of `choices` per question.
      accuracy: share of questions whose right choice has the largest log p per token; None of completions.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Validation:
    """What to validate on, and how often.

    Args:
      examples: questions with all their choices, or completions.
      loss: answer or choices, as is trained on.
      every: steps between two validations; there is one at the end too.
      patience: validations in a row without a lower loss after which training ends; None: it never does.

    Raises:
      ValueError: no examples, a number below 1, or the choices of completions.
    """

    examples: Sequence[Encoded]
    loss: str
    every: int
    patience: int | None = None

    def __post_init__(self):
        if not self.examples:
            raise ValueError("There is nothing to validate on. Give at least one example.")
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"eval_every={self.every}, patience={self.patience}; both count from 1. Correct them.")
        if self.loss == "choices" and not self._are_questions:
            raise ValueError("loss='choices' compares answers; validate on questions, not on completions.")

    @property
    def _are_questions(self) -> bool:
        return min(len(example.branches) for example in self.examples) > 1

    def measure(self, model: Any) -> Validated:
        """Returns loss and accuracy of a model; the devices of its placement share the examples."""
        scores = evaluate(model, self.examples)
        loss = scores.choice_loss if self.loss == "choices" else scores.nll_token
        return Validated(loss, scores.accuracy_token if self._are_questions else None)

    def is_over(self, losses: Sequence[float]) -> bool:
        """Returns whether training ends after these losses, oldest first."""
        return bool(losses) and self.patience is not None and len(losses) - 1 - int(np.argmin(losses)) >= self.patience
