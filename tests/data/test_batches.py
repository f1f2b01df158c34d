"""Rows against a slow construction, the order of training, and evaluation that covers all."""

import hashlib
import inspect
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from stable_lora_jax.data import (
    Batch,
    BatchRows,
    Encoded,
    TrainBatches,
    encode_all,
    eval_batches,
    load_task,
    make_batch,
    prefetch,
    right_branch_only,
)


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return encode_all(tokenizer, load_task("arc_easy", "validation"), "cloze")


def numbered(count: int, seed: int = 0) -> list[Encoded]:
    """Examples that can be told apart by their first token."""
    rng = np.random.default_rng(seed)
    return [
        Encoded((i, *[1] * rng.integers(30)), tuple((2,) * rng.integers(1, 9) for _ in range(4)), int(rng.integers(4)))
        for i in range(count)
    ]


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_row_by_hand() -> None:
    batch = make_batch([Encoded((10, 11, 12), ((20, 21, 22), (30,), (40, 41)), 2)], num_rows=2)
    assert batch.tokens[0].tolist() == [10, 11, 12, 20, 21, 40] + [0] * 10
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 3] + [0] * 10
    assert batch.segments[0].tolist() == [0, 0, 0, 1, 1, 3] + [-1] * 10
    assert batch.read_at[0].tolist() == [2, 3, 4, 2, 2, 5, 0, 0]
    assert batch.targets[0].tolist() == [20, 21, 22, 30, 40, 41, 0, 0]
    assert batch.branch[0].tolist() == [0, 0, 0, 1, 2, 2, -1, -1]
    assert batch.answer.tolist() == [[2], [-1]]
    assert batch.documents[0].tolist() == [0] * 6 + [-1] * 10
    assert batch.owner[0].tolist() == [0] * 6 + [-1] * 2
    assert all(array.dtype == np.int32 for array in batch)
    for name in ("segments", "documents", "branch", "owner"):
        assert (getattr(batch, name)[1] == -1).all()


def test_each_target_sees_its_own_sequence(examples: list[Encoded]) -> None:
    """What a target's token may see, in the order of positions, is prefix + branch up to that target."""
    chosen = examples[::19]
    batch = make_batch(chosen)
    for row, example in enumerate(chosen):
        segments, seen_targets = batch.segments[row], Counter()
        for read_at, target, branch in zip(batch.read_at[row], batch.targets[row], batch.branch[row], strict=True):
            if branch == -1:
                continue
            done = seen_targets[branch]
            sees = [j for j in range(read_at + 1) if segments[j] == segments[read_at] or segments[j] == 0]
            sequence = [*example.prefix, *example.branches[branch]]
            assert batch.tokens[row, sees].tolist() == sequence[: len(example.prefix) + done]
            assert batch.positions[row, sees].tolist() == list(range(len(sees)))
            assert target == example.branches[branch][done]
            seen_targets[branch] += 1
        assert [seen_targets[c] for c in range(len(example.branches))] == [len(b) for b in example.branches]
        assert (segments >= 0).sum() == example.length


def test_same_step_same_bits_in_another_process() -> None:
    def digest(batches: TrainBatches) -> str:
        return hashlib.sha256(b"".join(a.tobytes() for step in (0, 7, 40, 3) for a in batches[step])).hexdigest()

    batches = TrainBatches(numbered(100), batch_size=8, seed=3, max_length=100)
    first = digest(batches)
    _ = batches[500]
    assert digest(batches) == first
    code = (
        "from tests.data.test_batches import *; import hashlib;"
        "b = TrainBatches(numbered(100), batch_size=8, seed=3, max_length=100);"
        "print(hashlib.sha256(b''.join(a.tobytes() for step in (0, 7, 40, 3) for a in b[step])).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == first
    other = TrainBatches(numbered(100), batch_size=8, seed=4, max_length=100)
    assert digest(other) != first


def test_epochs() -> None:
    examples = numbered(100)
    batches = TrainBatches(examples, batch_size=8, seed=0, max_length=100)
    assert batches.steps_per_epoch == 12
    epochs = []
    for epoch in range(3):
        steps = range(12 * epoch, 12 * epoch + 12)
        seen = [int(index) for step in steps for index in batches.indices(step)]
        assert len(seen) == len(set(seen)) == 96
        assert seen == [int(first) for step in steps for first in batches[step].tokens[:, 0]]
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert {*epochs[0]} != {*epochs[1]}  # the examples left out differ
    whole = TrainBatches(examples[:96], batch_size=8, seed=0, max_length=100)
    assert sorted(int(index) for step in range(12) for index in whole.indices(step)) == list(range(96))


def test_training_pads_little_in_few_shapes(examples: list[Encoded]) -> None:
    batches = TrainBatches([*map(right_branch_only, examples)], batch_size=8, seed=0, max_length=200)
    made = [batches[step] for step in range(batches.steps_per_epoch)]
    used = sum((batch.segments >= 0).sum() for batch in made) / sum(batch.tokens.size for batch in made)
    assert used > 0.78  # 0.80 measured
    assert len({(batch.tokens.shape, batch.targets.shape) for batch in made}) <= 12  # 11 measured


def test_training_errors() -> None:
    examples = numbered(10)
    for size in (0, 11):
        with pytest.raises(ValueError, match=rf"batch_size is {size}; allowed are 1 to the number of examples, 10"):
            TrainBatches(examples, batch_size=size, seed=0, max_length=100)
    with pytest.raises(ValueError, match=r"seed is -1; allowed are integers from 0"):
        TrainBatches(examples, batch_size=2, seed=-1, max_length=100)
    with pytest.raises(ValueError, match=r"step is -1; allowed are integers from 0"):
        _ = TrainBatches(examples, batch_size=2, seed=0, max_length=100)[-1]
    long = [*examples, Encoded((1,) * 101, ((1,),), 0)]
    with pytest.raises(ValueError, match=r"1 of 11 examples take more than max_length=100 tokens, up to 101; .* 10"):
        TrainBatches(long, batch_size=2, seed=0, max_length=100)


@pytest.mark.parametrize(("max_tokens", "multiple"), [(2048, 1), (512, 1), (16, 1), (2048, 12), (16, 12)])
def test_evaluation_covers_all(examples: list[Encoded], max_tokens: int, multiple: int) -> None:
    batches = eval_batches(examples, max_tokens=max_tokens, multiple=multiple)
    assert sorted(index for indices, _ in batches for index in indices) == list(range(570))
    for indices, batch in batches:
        rows, width = batch.tokens.shape
        assert rows == multiple or rows * width <= max_tokens
        assert rows % multiple == 0
        assert (batch.answer[:, 0] >= 0).tolist() == [True] * len(indices) + [False] * (rows - len(indices))
        expected = make_batch(
            [examples[i] for i in indices], num_rows=rows, width=width, num_targets=batch.targets.shape[1]
        )
        assert equal(batch, expected)
    widths = [batch.tokens.shape[1] for _, batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_evaluation_pads_little_in_few_shapes(examples: list[Encoded]) -> None:
    batches = [batch for _, batch in eval_batches(examples)]
    used = sum(example.length for example in examples) / sum(batch.tokens.size for batch in batches)
    assert used > 0.85  # 0.91 measured
    assert len({(batch.tokens.shape, batch.targets.shape) for batch in batches}) <= 14  # 13 measured
    assert eval_batches([]) == []


def test_evaluation_errors() -> None:
    with pytest.raises(ValueError, match=r"max_tokens is 0; it must be at least 1"):
        eval_batches(numbered(3), max_tokens=0)


def test_shares_of_a_batch_are_its_rows() -> None:
    batches = TrainBatches(numbered(40), batch_size=8, seed=1, max_length=999)
    for step in range(10):
        whole = batches[step]
        for chosen in ((0, 1, 2, 3), (4, 5), (3, 7)):
            share = BatchRows(batches, chosen)[step]
            assert equal(share, Batch(*(array[list(chosen)] for array in whole)))
        assert batches.num_tokens(step) == (whole.segments >= 0).sum()


def test_prefetch_equals_the_loop() -> None:
    batches = TrainBatches(numbered(50), batch_size=8, seed=1, max_length=100)
    got = list(prefetch(batches, 3, 20))
    assert [step for step, _ in got] == list(range(3, 20))
    assert all(equal(batch, batches[step]) for step, batch in got)
    assert list(prefetch(batches, 5, 5)) == []


def test_prefetch_reads_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grain looks a function up in its file, and fails where that was edited since the process began."""

    def edited(*_: object) -> None:
        raise SyntaxError("unterminated string")

    monkeypatch.setattr(inspect, "getsourcelines", edited)
    batches = TrainBatches(numbered(10), batch_size=2, seed=0, max_length=100)
    assert [step for step, _ in prefetch(batches, 0, 3)] == [0, 1, 2]


def test_prefetch_raises_in_the_loop_at_its_step() -> None:
    batches = TrainBatches(numbered(50), batch_size=8, seed=1, max_length=100)

    class Broken:
        def __getitem__(self, step: int) -> Batch:
            if step == 6:
                raise RuntimeError("broken at 6")
            return batches[step]

    seen = []
    with pytest.raises(RuntimeError, match=r"broken at 6"):
        seen.extend(step for step, _ in prefetch(Broken(), 4, 10))
    steps = prefetch(Broken(), 4, 10)
    assert [next(steps)[0], next(steps)[0]] == [4, 5]
