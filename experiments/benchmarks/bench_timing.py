"""What the benchmarks share: rows to work on, the clock, and the memory."""

import resource
import time
from typing import Any

import numpy as np

# SmolLM2-135M: rows per step, answer tokens per row, and what its layers hold.
BATCH, ANSWER, VOCABULARY = 8, 8, 49152
FROZEN_LAYER_WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)


def random_rows(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens (batch, length) and the answers (batch, ANSWER) that the last positions predict."""
    rng = np.random.default_rng(0)
    return rng.integers(0, VOCABULARY, (BATCH, length)), rng.integers(0, VOCABULARY, (BATCH, ANSWER))


def answer_batch(tokens: np.ndarray, targets: np.ndarray) -> Any:
    """Returns a `Batch` of rows whose last tokens are predicted."""
    from stable_lora_jax.data import Batch

    (rows, length), answer = tokens.shape, targets.shape[1]
    zeros, firsts = np.zeros_like(tokens), np.zeros_like(targets)
    batch = Batch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(length), tokens.shape),
        segments=zeros,
        documents=zeros,
        read_at=np.broadcast_to(np.arange(length - answer, length), targets.shape),
        targets=targets,
        branch=firsts,
        owner=firsts,
        answer=np.zeros((rows, 1)),
    )
    return Batch(*(np.asarray(each, np.int32) for each in batch))


def timed(step: Any, count: int) -> list[float]:
    """Returns the seconds of `count` calls, after one that is not counted."""
    step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - start, 4))
    return seconds


def peft_logits(model: Any, tokens: Any, predicted: int, **options: Any) -> Any:
    """Returns PEFT's float32 logits (rows * predicted, vocabulary) at the last positions.

    What `logits_to_keep` computes, without its price in bfloat16 on a CPU: there the slice of hidden states, which is
    not contiguous, meets a copy of the output layer for each row. One matrix of rows meets the layer as it is.
    """
    causal = model.base_model.model
    hidden = causal.model(tokens, **options).last_hidden_state[:, -predicted:]
    return causal.lm_head(hidden.flatten(0, 1)).float()


def page_faults() -> int:
    """Returns how often this process has touched memory that the system had yet to hand out."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
