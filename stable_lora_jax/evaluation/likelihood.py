"""Log-likelihoods of answers, and the accuracies that follow from them.

A row holds a question once and all its choices (see `stable_lora_jax.data.batches`), so the shared prefix is computed
once; logits are computed only where an answer token is predicted.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float
from tqdm import tqdm

from stable_lora_jax.data import Batch, Encoded, check_fits, eval_batches
from stable_lora_jax.models import Decoder

_CHUNK = 128  # targets whose logits are in memory at once while evaluating


def target_log_likelihoods(model: Decoder, batch: Batch, *, one_branch: bool = False) -> Float[Array, "B P"]:
    """Returns log p of every predicted token, float32 nats; 0 in padding.

    Args:
      model: with or without adapters.
      batch: rows of examples.
      one_branch: whether no question has more than one branch. In rows of one question attention is then plainly
        causal, since only padding, which stands last and is not read, would see what it should not; that is what fused
        kernels are fastest at.
    """
    arrays: Any = jax.tree.map(jnp.asarray, batch)
    read = _read_states(model, arrays, one_branch)
    return jnp.where(arrays.branch >= 0, model.log_likelihoods(read, arrays.targets), 0.0)


def branch_log_likelihoods(
    target: Float[Array, "B P"], batch: Batch, num_branches: int
) -> tuple[Float[Array, "B E C"], Float[Array, "B E C"]]:
    """Returns the summed log-likelihood of each branch of each question in a row, and its number of tokens.

    Args:
      target: log p of the predicted tokens.
      batch: the rows.
      num_branches: C, at least the number of branches of any question.
    """
    shape = (*batch.answer.shape, num_branches)
    index = jnp.where(jnp.asarray(batch.branch) >= 0, batch.owner * num_branches + batch.branch, -1)
    member = (index[..., None] == jnp.arange(shape[1] * shape[2])).astype(target.dtype)
    sums, counts = jnp.einsum("bp,bpc->bc", target, member), member.sum(1)
    return sums.reshape(shape), counts.reshape(shape)


class NonFiniteScoreError(ValueError):
    """A log-likelihood is not finite, so answers cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of questions.

    Attributes:
      log_likelihood: per question, the summed log p of each choice, nats.
      num_tokens: per question, the number of tokens of each choice.
      answer: per question, the index of the right choice.
    """

    log_likelihood: tuple[np.ndarray, ...]
    num_tokens: tuple[np.ndarray, ...]
    answer: tuple[int, ...]

    @property
    def correct_sum(self) -> np.ndarray:
        """Per question, whether the right choice has the largest log p."""
        return np.array([s.argmax() == a for s, a in zip(self.log_likelihood, self.answer, strict=True)])

    @property
    def correct_token(self) -> np.ndarray:
        """Per question, whether the right choice has the largest log p per token."""
        per_token = [s / n for s, n in zip(self.log_likelihood, self.num_tokens, strict=True)]
        return np.array([s.argmax() == a for s, a in zip(per_token, self.answer, strict=True)])

    @property
    def accuracy_sum(self) -> float:
        """Share of questions whose right choice has the largest log p."""
        return float(np.mean(self.correct_sum))

    @property
    def accuracy_token(self) -> float:
        """Share of questions whose right choice has the largest log p per token."""
        return float(np.mean(self.correct_token))

    @property
    def nll_token(self) -> float:
        """Negative log-likelihood of the right answers, nats per token, over all their tokens."""
        right = [(s[a], n[a]) for s, n, a in zip(self.log_likelihood, self.num_tokens, self.answer, strict=True)]
        return float(-sum(s for s, _ in right) / sum(n for _, n in right))

    @property
    def choice_loss(self) -> float:
        """Negative logarithm of the right choice's share in a softmax over log p per token, nats per question."""
        per_token = [s / n for s, n in zip(self.log_likelihood, self.num_tokens, strict=True)]
        shares = [s[a] - np.logaddexp.reduce(s) for s, a in zip(per_token, self.answer, strict=True)]
        return float(-np.mean(shares))

    def summary(self) -> dict[str, float]:
        """Returns the three figures by name, with the number of questions."""
        return {
            "accuracy_sum": self.accuracy_sum,
            "accuracy_token": self.accuracy_token,
            "nll_token": self.nll_token,
            "questions": len(self.answer),
        }


def evaluate(
    model: Decoder, examples: Sequence[Encoded], *, max_tokens: int = 2048, progress: bool = False
) -> Evaluation:
    """Returns the scores of every choice of every example, in the order given.

    Args:
      model: with or without adapters; dropout is off while it is evaluated. Where its placement splits rows over
        devices, each of them scores its part.
      examples: questions with all their branches.
      max_tokens: most tokens of a batch per device; bounds memory.
      progress: show a progress bar.

    Raises:
      ValueError: no examples, or one that the model cannot read.
      NonFiniteScoreError: a log-likelihood that is not finite.
    """
    if not examples:
        raise ValueError("evaluate got no examples. Give at least one question.")
    check_fits(examples, vocab_size=model.config.vocab_size, max_positions=model.config.max_positions)
    graph, state = nnx.split(nnx.view(model, deterministic=True, raise_if_not_found=False))
    sums: list[np.ndarray] = [np.empty(0)] * len(examples)
    counts = [np.array(example.target_counts) for example in examples]
    splits = model.placement.row_splits
    batches = eval_batches(examples, max_tokens=max_tokens * splits, multiple=splits)
    with tqdm(total=len(examples), desc="evaluate", unit="question", disable=not progress) as bar:
        for indices, batch in batches:
            scores = _scores(graph, state, batch) if splits == 1 else _gathered(_score_rows(graph, state, batch))
            for row, index in enumerate(indices):
                per_branch = np.bincount(batch.branch[row] + 1, scores[row], minlength=len(counts[index]) + 1)
                sums[index] = per_branch[1:]  # the first is padding
                if not np.isfinite(sums[index]).all():
                    raise NonFiniteScoreError(
                        f"Question {index} has log-likelihoods {sums[index].tolist()}; only finite ones can be "
                        "compared. Look for weights that are not finite in the adapter, or compute in float32."
                    )
            bar.update(len(indices))
    return Evaluation(
        log_likelihood=tuple(sums), num_tokens=tuple(counts), answer=tuple(example.answer for example in examples)
    )


def _scores(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[np.ndarray, "B P"]:
    """Returns log p of every target of a batch, 0 in padding."""
    real = np.flatnonzero(batch.branch >= 0)
    chunks = -(-len(real) // _CHUNK)
    where = np.zeros(-(-batch.branch.size // _CHUNK) * _CHUNK, np.int32)
    where[: len(real)] = real
    scores = np.zeros(batch.branch.size)
    scores[real] = _gathered(_score_chunks(graph, state, batch, where, chunks))[: len(real)]
    return scores.reshape(batch.branch.shape)


def _gathered(found: Array) -> np.ndarray:
    """Returns an array whole, also where several processes hold its parts."""
    return np.asarray(found if found.is_fully_addressable else process_allgather(found, tiled=True))


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[Array, "B P"]:
    """Returns log p of every target, 0 in padding, of rows that devices share: each keeps to its own."""
    return target_log_likelihoods(nnx.merge(graph, state), batch)


@functools.partial(jax.jit, static_argnums=0)
def _score_chunks(graph: nnx.GraphDef, state: nnx.State, batch: Batch, where: Array, chunks: Array) -> Array:
    """Returns log p of the targets at the flat indices `where`, of which the first chunks count.

    More than half of the (B, P) targets are padding. Going through the real ones alone, a chunk at a time, saves the
    work of their logits, and their memory, without a compilation for every number of them.
    """
    model = nnx.merge(graph, state)
    read = _read_states(model, batch, False)
    read = read.reshape(-1, read.shape[-1])[where]
    targets = batch.targets.reshape(-1)[where]

    def score(chunk: Array, scores: Array) -> Array:
        part = [jax.lax.dynamic_slice_in_dim(array, chunk * _CHUNK, _CHUNK)[None] for array in (read, targets)]
        log_p = nnx.merge(graph, state).log_likelihoods(*part)[0]
        return jax.lax.dynamic_update_slice_in_dim(scores, log_p, chunk * _CHUNK, 0)

    return jax.lax.fori_loop(0, chunks, score, jnp.zeros(where.shape))


def _read_states(model: Decoder, batch: Any, one_branch: bool) -> Float[Array, "B P D"]:
    """Returns the hidden states that targets are predicted from."""
    segments = None if one_branch else batch.segments
    documents = batch.documents if batch.answer.shape[1] > 1 else None
    return model.hidden_states(batch.tokens, batch.positions, segments, documents, batch.read_at)
