"""What is done with examples that are too long."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from stable_lora_jax.data.encoding import Encoded

TooLong: TypeAlias = Literal["refuse", "truncate", "skip"]


def fit(examples: Sequence[Encoded], max_length: int, too_long: TooLong) -> tuple[list[Encoded], int]:
    """Returns the examples that are trained on, and how many were cut or left out.

    Args:
      examples: of one branch where they are to be cut.
      max_length: most input tokens of an example.
      too_long: refuse (nothing is done: the batches refuse them), truncate (the first tokens are cut off) or skip
        (left out).

    Raises:
      ValueError: a question with several choices to be cut, or no example left.
    """
    long = sum(example.length > max_length for example in examples)
    if too_long == "refuse" or not long:
        return list(examples), 0
    if too_long == "skip":
        kept = [example for example in examples if example.length <= max_length]
        if not kept:
            raise ValueError(f"All {long} examples take more than {max_length} tokens. Raise max_length.")
        return kept, long
    return [example if example.length <= max_length else _cut(example, max_length) for example in examples], long


def _cut(example: Encoded, max_length: int) -> Encoded:
    """Returns the last tokens of an example, of which max_length are read and one more is predicted."""
    branch, *others = example.branches
    if others:
        raise ValueError("A question with several choices cannot be truncated. Skip those that are too long.")
    tokens = [*example.prefix, *branch][-max_length - 1 :]
    learnt = [False] * len(example.prefix) + list(example.learnt or (True,) * len(branch))
    learnt = [False, *learnt[-max_length:]]  # nothing predicts the first
    first = learnt.index(True)
    return Encoded(tuple(tokens[:first]), (tuple(tokens[first:]),), 0, learnt=tuple(learnt[first:]))
