"""Rows, batches and their order: what a model sees at a step depends on (data, seed, step) only.

A row holds one question, or several (see `packing`). A question's own tokens stand there once and are shared by all
answers:

    tokens     q0 q1 q2 | a0 a1 | b0        prefix q (p = 3), branches a = a0 a1 a2 and b = b0 b1
    positions   0  1  2 |  3  4 |  3        a branch continues the prefix
    segments    0  0  0 |  1  1 |  2        0 prefix, c + 1 branch c, -1 padding
    read_at     2  3  4 |  2  5             where each target is predicted
    targets    a0 a1 a2 | b0 b1

A branch's first token is predicted at the last prefix token, and its last token predicts nothing, so k tokens take
k - 1 places. Where not all tokens of a branch are learnt, only those that are have a target. A second question in the
row begins behind the first, with positions and segments anew, and `documents` tells them apart. Token i sees token j
where j <= i, documents[j] == documents[i] and (segments[j] == segments[i] or segments[j] == 0). Padding stands last and
is a document of its own, so no token sees it but padding, which sees itself (no softmax is empty).

T and P are padded up to `bucket` sizes, so the number of compiled shapes is bounded.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from stable_lora_jax.data.encoding import Encoded

_CHUNK_BATCHES = 32


class Batch(NamedTuple):
    """B rows of T input tokens and P predicted tokens, of at most E questions each (see the module's drawing).

    Attributes:
      tokens: token numbers, 0 in padding.
      positions: position of each token in its sequence, 0 in padding.
      segments: 0 prefix, c + 1 branch c, -1 padding.
      documents: which of the row's questions a token belongs to, from 0; -1 padding.
      read_at: index in the row of the token whose output predicts the target, 0 in padding.
      targets: token numbers to predict, 0 in padding.
      branch: branch of each target, -1 in padding.
      owner: which of the row's questions a target belongs to, -1 in padding.
      answer: index of the right branch of each question, -1 where there is none.
    """

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    documents: Int32[np.ndarray, "B T"]
    read_at: Int32[np.ndarray, "B P"]
    targets: Int32[np.ndarray, "B P"]
    branch: Int32[np.ndarray, "B P"]
    owner: Int32[np.ndarray, "B P"]
    answer: Int32[np.ndarray, "B E"]


def bucket(size: int, *, smallest: int, steps: int) -> int:
    """Returns the least allowed size of at least `size`: `smallest`, and `steps` even steps to each doubling of it.

    Args:
      size: >= 0.
      smallest: the least result; a multiple of `steps`.
      steps: more steps, less padding and more shapes to compile.

    Examples:
      >>> [bucket(size, smallest=16, steps=2) for size in (1, 17, 25, 33, 64, 65, 1000)]
      [16, 24, 32, 48, 64, 96, 1024]
    """
    if size <= smallest:
        return smallest
    octave = smallest << (((size - 1) // smallest).bit_length() - 1)
    step = octave // steps
    return -(-size // step) * step


def make_batch(
    examples: Sequence[Encoded],
    *,
    num_rows: int | None = None,
    width: int | None = None,
    num_targets: int | None = None,
) -> Batch:
    """Returns the rows of the examples, one each, in their order.

    Args:
      examples: at least one.
      num_rows: B; rows beyond the examples are padding. The number of examples if None.
      width: T; the bucket of the longest row if None.
      num_targets: P; the bucket of the most targets if None.
    """
    return make_rows(
        [[example] for example in examples],
        num_rows=num_rows or len(examples),
        width=width or _train_width(max(example.length for example in examples)),
        num_targets=num_targets or targets_bucket(max(example.num_targets for example in examples)),
        num_documents=1,
    )


def make_rows(
    rows: Sequence[Sequence[Encoded]], *, num_rows: int, width: int, num_targets: int, num_documents: int
) -> Batch:
    """Returns rows of several examples each.

    Args:
      rows: the examples of each row.
      num_rows: B, at least the number of rows; what is beyond them is padding.
      width: T, at least the tokens of any row.
      num_targets: P, at least the targets of any row.
      num_documents: E, at least the examples of any row.
    """

    def full(value: int, *shape: int) -> np.ndarray:
        return np.full((num_rows, *shape), value, np.int32)

    batch = Batch(
        tokens=full(0, width),
        positions=full(0, width),
        segments=full(-1, width),
        documents=full(-1, width),
        read_at=full(0, num_targets),
        targets=full(0, num_targets),
        branch=full(-1, num_targets),
        owner=full(-1, num_targets),
        answer=full(-1, num_documents),
    )
    for row, examples in enumerate(rows):
        token = target = 0
        for document, example in enumerate(examples):
            _fill(batch, row, document, example, token, target)
            token, target = token + example.length, target + example.num_targets
    return batch


def pad_batch(batch: Batch, width: int, num_targets: int, num_documents: int) -> Batch:
    """Returns the same rows with T, P and E padded to these sizes, none below what it is."""
    sizes = {"tokens": width, "positions": width, "segments": width, "documents": width, "answer": num_documents}
    values = {"segments": -1, "documents": -1, "branch": -1, "owner": -1, "answer": -1}

    def pad(name: str, array: np.ndarray) -> np.ndarray:
        missing = sizes.get(name, num_targets) - array.shape[1]
        return np.pad(array, ((0, 0), (0, missing)), constant_values=values.get(name, 0))

    return Batch(**{name: pad(name, array) for name, array in batch._asdict().items()})


def _fill(batch: Batch, row: int, document: int, example: Encoded, token: int, target: int) -> None:
    """Writes an example into a row, from this token and this target on."""
    prefix_length = len(example.prefix)
    prefix = slice(token, token + prefix_length)
    batch.tokens[row, prefix] = example.prefix
    batch.positions[row, prefix] = np.arange(prefix_length)
    batch.segments[row, prefix] = 0
    batch.documents[row, token : token + example.length] = document
    batch.answer[row, document] = example.answer
    batch.owner[row, target : target + example.num_targets] = document
    last, start, first = prefix.stop - 1, prefix.stop, target
    for index, tokens in enumerate(example.branches):
        inputs = slice(start, start + len(tokens) - 1)
        batch.tokens[row, inputs] = tokens[:-1]
        batch.positions[row, inputs] = np.arange(prefix_length, prefix_length + len(tokens) - 1)
        batch.segments[row, inputs] = index + 1
        learnt = slice(None) if example.learnt is None else np.array(example.learnt)
        told = np.array(tokens)[learnt]
        places = slice(first, first + len(told))
        batch.read_at[row, places] = np.array([last, *range(inputs.start, inputs.stop)])[learnt]
        batch.targets[row, places] = told
        batch.branch[row, places] = index
        start, first = inputs.stop, places.stop


class TrainBatches:
    """Training batches by step: `batches[step]` for any step >= 0, the same in every process.

    Each epoch is a fresh permutation; inside runs of 32 batches examples are sorted by size, so rows of a batch need
    little padding, and then the batches are shuffled. Examples that fill no whole batch are left out of that epoch.

    Args:
      examples: all branches (softmax over the choices) or `right_branch_only` (answer tokens).
      batch_size: B.
      seed: >= 0.
      max_length: longest row allowed, in tokens.

    Raises:
      ValueError: fewer examples than a batch, an example that is too long, a negative seed or step.
    """

    def __init__(self, examples: Sequence[Encoded], *, batch_size: int, seed: int, max_length: int):
        if not 1 <= batch_size <= len(examples):
            raise ValueError(
                f"batch_size is {batch_size}; allowed are 1 to the number of examples, {len(examples)}. "
                "Choose a smaller batch or give more data."
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}; allowed are integers from 0. Choose another seed.")
        _check_lengths(examples, max_length)
        self._examples = examples
        self.batch_size = batch_size
        self._seed = seed
        self._sort_keys = np.array([(_train_width(example.length), example.num_targets) for example in examples])
        # Two, because a prefetching thread is one epoch ahead for a while, unless an epoch is shorter than its lead.
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    @property
    def num_rows(self) -> int:
        """Rows of each batch."""
        return self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data."""
        return len(self._examples) // self.batch_size

    def indices(self, step: int) -> Int32[np.ndarray, " B"]:
        """Returns which examples the batch of a step holds, in the order of its rows."""
        if step < 0:
            raise ValueError(f"step is {step}; allowed are integers from 0. Count steps from the start of training.")
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[batch]

    def num_tokens(self, step: int) -> int:
        """Returns the input tokens of the whole batch, padding left out."""
        return sum(self._examples[index].length for index in self.indices(step))

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, range(self.num_rows))

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Returns some rows of the batch of a step, as wide as the whole batch."""
        examples = [self._examples[index] for index in self.indices(step)]
        return make_batch(
            [examples[row] for row in rows],
            width=_train_width(max(example.length for example in examples)),
            num_targets=targets_bucket(max(example.num_targets for example in examples)),
        )

    def _epoch_order(self, epoch: int) -> Int32[np.ndarray, "steps B"]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._examples)).astype(np.int32)
        order = order[: self.steps_per_epoch * self.batch_size]
        width, num_targets = self._sort_keys[order].T
        chunk = np.arange(len(order)) // (_CHUNK_BATCHES * self.batch_size)
        batches = order[np.lexsort((num_targets, width, chunk))].reshape(-1, self.batch_size)
        return rng.permutation(batches)


@dataclass(frozen=True)
class BatchRows:
    """The same rows of every training batch: what one of several processes reads."""

    batches: TrainBatches
    chosen: Sequence[int]

    def __getitem__(self, step: int) -> Batch:
        return self.batches.rows(step, self.chosen)


def eval_batches(
    examples: Sequence[Encoded], *, max_tokens: int = 2048, multiple: int = 1
) -> list[tuple[list[int], Batch]]:
    """Returns batches that hold every example once, longest first, so that too little memory shows at once.

    Examples of about one length form a group, cut evenly into batches of one shape: one compilation per group.

    Args:
      examples: usually with all branches.
      max_tokens: most tokens of a batch, B * T. A longer row stands alone.
      multiple: B is a multiple of it, so that rows can be split over as many devices; then B is no less.

    Returns:
      (indices of the examples, batch) pairs; row i of the batch is the example `indices[i]`, further rows are
      padding.

    Raises:
      ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1. Leave it out for 2048.")
    batches = []
    for group in _groups_by_width(examples, max_tokens // 2):
        width = _eval_width(examples[group[0]].length)
        num_targets = targets_bucket(max(examples[index].num_targets for index in group))
        rows_allowed = multiple * max(1, max_tokens // width // multiple)
        rows = _ceil_div(len(group), _ceil_div(len(group), rows_allowed))
        rows = multiple * _ceil_div(rows, multiple)
        for start in range(0, len(group), rows):
            chosen = group[start : start + rows]
            batch = make_batch(
                [examples[index] for index in chosen], num_rows=rows, width=width, num_targets=num_targets
            )
            batches.append((chosen, batch))
    return batches


def _groups_by_width(examples: Sequence[Encoded], min_tokens: int) -> list[list[int]]:
    """Returns indices, longest first, cut where the width falls; a group below min_tokens takes narrower ones too."""
    groups: list[list[int]] = []
    group_width = 0
    for index in sorted(range(len(examples)), key=lambda index: examples[index].length, reverse=True):
        width = _eval_width(examples[index].length)
        if not groups or (width < group_width and len(groups[-1]) * group_width >= min_tokens):
            groups.append([])
            group_width = width
        groups[-1].append(index)
    return groups


@runtime_checkable
class BatchesByStep(Protocol):
    """What `prefetch` needs: a batch for any step, as `TrainBatches` gives."""

    def __getitem__(self, step: int, /) -> Batch: ...


def prefetch(batches: BatchesByStep, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) for start <= step < stop, made in a thread up to 8 steps ahead of the loop.

    An error while making a batch is raised in the loop, at its step.
    """
    import grain

    class WithBatch(grain.transforms.Map):  # of a function Grain reads the source, which may have been edited since
        def map(self, element: int) -> tuple[int, Batch]:
            return int(element), batches[int(element)]

    steps = grain.MapDataset.range(start, stop).map(WithBatch())
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def _train_width(length: int) -> int:
    return bucket(length, smallest=16, steps=2)


def _eval_width(length: int) -> int:
    # Evaluation has one number of targets per group, so it can afford more widths.
    return bucket(length, smallest=16, steps=4)


def targets_bucket(num_targets: int) -> int:
    """Returns the number of targets that a row is padded to."""
    return bucket(num_targets, smallest=8, steps=1)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _check_lengths(examples: Sequence[Encoded], max_length: int) -> None:
    if over := [index for index, example in enumerate(examples) if example.length > max_length]:
        most = max(examples[index].length for index in over)
        raise ValueError(
            f"{len(over)} of {len(examples)} examples take more than max_length={max_length} tokens, up to {most}; the "
            f"first is example {over[0]}. Raise max_length (and mind the model's context), or shorten or remove them."
        )
