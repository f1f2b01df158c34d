"""Batches of one shape for a whole run: rows of one length that hold several examples each.

A batch still is `batch_size` examples; how they are laid in rows changes neither its loss nor its gradients. Which
examples make a batch is drawn so that all batches have about as many tokens: every epoch deals a fresh permutation,
sorted by length, in `batch_size` rounds, the longest of a round to the batch with the fewest tokens so far; then the
heaviest batches swap examples with the lightest until they fit, and those with the most targets swap examples of equal
length with those with the fewest. So each batch has its share of long and of short examples (long ones never come
together by chance), and the order of the batches is random.

The number of rows R is that of least work, where a token costs 1 and what it attends to 1/1024 per token of its row;
the length T is the least multiple of 16 that holds every row of the run. So a run compiles its step once.
"""

import functools
import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from stable_lora_jax.data.batches import Batch, TrainBatches, make_rows
from stable_lora_jax.data.encoding import Encoded

_TOKENS = 16  # T is a multiple of it
_ATTENTION = 1 / 1024  # cost of one token's attention to another one, in tokens
_ASKED = 64  # batches that are asked for a swap, before the heaviest one is left as it is
_PROBED = 512  # batches that the number of rows is chosen by


class PackedBatches(TrainBatches):
    """Training batches by step, as `TrainBatches`, in rows that hold several examples.

    Args:
      examples: all branches (softmax over the choices) or `right_branch_only` (answer tokens).
      batch_size: examples per batch.
      seed: >= 0.
      max_length: longest example allowed, in tokens.
      num_steps: steps of the run, whose epochs decide the shape.
      multiple: the number of rows is a multiple of it, so that a mesh and gradient accumulation divide it.

    Raises:
      ValueError: as `TrainBatches`; fewer steps or a smaller multiple than 1, or one above the batch size.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        batch_size: int,
        seed: int,
        max_length: int,
        num_steps: int,
        multiple: int = 1,
    ):
        super().__init__(examples, batch_size=batch_size, seed=seed, max_length=max_length)
        if num_steps < 1 or not 1 <= multiple <= batch_size:
            raise ValueError(
                f"num_steps is {num_steps}, allowed from 1, and multiple {multiple}, allowed from 1 to the batch size, "
                f"{batch_size}. Pack a whole run, with a batch that the devices divide."
            )
        self._lengths = np.array([example.length for example in examples])
        self._targets = targets = np.array([example.num_targets for example in examples])
        self._num_rows = self._choose_rows(multiple)
        # Rows of an epoch: examples as they are laid, and where each row ends.
        self._laid = functools.lru_cache(maxsize=2)(self._lay_epoch)
        tokens = num_targets = documents = 0
        for epoch in range(-(-num_steps // self.steps_per_epoch)):
            for rows in self._laid(epoch):
                tokens = max(tokens, *(self._lengths[row].sum() for row in rows if len(row)))
                num_targets = max(num_targets, *(targets[row].sum() for row in rows if len(row)))
                documents = max(documents, *map(len, rows))
        self.width = _round_up(int(tokens), _TOKENS)
        self.num_targets, self.num_documents = _round_up(int(num_targets), 8), int(documents)

    @property
    def num_rows(self) -> int:
        """Rows of each batch."""
        return self._num_rows

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Returns some rows of the batch of a step."""
        self.indices(step)  # refuses a negative step
        epoch, batch = divmod(step, self.steps_per_epoch)
        laid = self._laid(epoch)[batch]
        return make_rows(
            [[self._examples[index] for index in laid[row]] for row in rows],
            num_rows=len(rows),
            width=self.width,
            num_targets=self.num_targets,
            num_documents=self.num_documents,
        )

    def _epoch_order(self, epoch: int) -> Int32[np.ndarray, "steps B"]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._examples)).astype(np.int32)[: self.steps_per_epoch * self.batch_size]
        return rng.permutation(self._even_batches(order, rng))

    def _even_batches(self, order: np.ndarray, rng: np.random.Generator) -> Int32[np.ndarray, "steps B"]:
        """Returns the examples in batches of about as many tokens, and then of about as many targets."""
        lengths, count = self._lengths, len(order) // self.batch_size
        rounds = order[np.argsort(-lengths[order], kind="stable")].reshape(self.batch_size, count)
        batches, load = np.empty((count, self.batch_size), order.dtype), np.zeros(count, int)
        for number, dealt in enumerate(rounds):
            ties = rng.permutation(count)
            lightest_first = ties[np.argsort(load[ties], kind="stable")]
            batches[lightest_first, number] = dealt
            load[lightest_first] += lengths[dealt]
        _swap_until_even(batches, lengths, np.zeros_like(lengths), rng)
        _swap_until_even(batches, self._targets, lengths, rng)
        return batches

    def _lay_epoch(self, epoch: int) -> list[list[list[int]]]:
        return [_lay(self._lengths, batch, self._num_rows) for batch in self._order(epoch)]

    def _choose_rows(self, multiple: int) -> int:
        """Returns the number of rows of least work, by some batches of the first epoch of seed 0.

        Not of the run's own seed, so that runs of several seeds have as many rows.
        """
        rng = np.random.default_rng(0)
        count = min(self.steps_per_epoch, _PROBED) * self.batch_size
        order = rng.permutation(len(self._examples))[:count].astype(np.int32)
        probed = self._even_batches(order, rng)

        def work(rows: int) -> float:
            filled = max(self._lengths[row].sum() for batch in probed for row in _lay(self._lengths, batch, rows))
            width = _round_up(int(max(filled, self._lengths.max())), _TOKENS)
            return rows * width * (1 + width * _ATTENTION)

        return min(range(multiple, self.batch_size + 1, multiple), key=work)


def _swap_until_even(batches: np.ndarray, weights: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> None:
    """Swaps examples of the heaviest batch with those of lighter ones, until none makes it lighter; in place.

    Args:
      batches: the examples of each.
      weights: of every example.
      kept: only examples that are equal in this are swapped.
      rng: draws the batches that are asked for a swap.
    """
    load = weights[batches].sum(1)
    even = _round_up(int(load.mean()), 8)
    heavy = [(-int(load[batch]), int(batch)) for batch in np.flatnonzero(load > even)]
    heapq.heapify(heavy)
    while heavy:
        _, most = heapq.heappop(heavy)
        if load[most] <= even:
            continue  # it has become lighter since
        for least in (int(load.argmin()), *rng.integers(len(load), size=_ASKED).tolist()):
            gap = load[most] - load[least]
            ours, theirs = batches[most], batches[least]
            moved = weights[ours][:, None] - weights[theirs][None, :]
            allowed = (kept[ours][:, None] == kept[theirs][None, :]) & (moved > 0) & (moved < gap)
            left = np.where(allowed, np.abs(gap - 2 * moved), gap)  # between the two, after the swap
            i, j = np.unravel_index(left.argmin(), left.shape)
            if not allowed[i, j]:
                continue
            ours[i], theirs[j] = theirs[j], ours[i]
            load[most] -= moved[i, j]
            load[least] += moved[i, j]
            for batch in (most, least):
                if load[batch] > even:
                    heapq.heappush(heavy, (-int(load[batch]), batch))
            break
        else:
            return


def _lay(lengths: np.ndarray, batch: np.ndarray, rows: int) -> list[list[int]]:
    """Returns the examples of each row: the longest first, each into the row with the fewest tokens."""
    laid: list[list[int]] = [[] for _ in range(rows)]
    load = [0] * rows
    for index in batch[np.argsort(-lengths[batch], kind="stable")].tolist():
        row = load.index(min(load))
        laid[row].append(index)
        load[row] += int(lengths[index])
    return laid


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
