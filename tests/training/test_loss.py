"""Both losses against their definitions."""

from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.data import make_batch, make_rows, right_branch_only
from stable_lora_jax.training import make_loss, split_model
from stable_lora_jax.training.step import join_model
from tests.training.tiny_runs import adapted, naive_log_likelihoods, questions

EXAMPLES = questions(6)


def call(loss, batch):
    return nnx.jit(lambda model: loss(model, batch))(adapted())


@pytest.fixture(scope="module")
def log_likelihoods():
    model = adapted()
    return [np.array(naive_log_likelihoods(model, example), np.float64) for example in EXAMPLES]


def test_answer(log_likelihoods):
    batch = make_batch([right_branch_only(example) for example in EXAMPLES], num_rows=8)
    total, count = call(make_loss("answer", 4), batch)
    expected = -sum(s[e.answer] for s, e in zip(log_likelihoods, EXAMPLES, strict=True))
    np.testing.assert_allclose(total, expected, rtol=1e-5)  # float32 sums in another order
    assert count == sum(len(example.branches[example.answer]) for example in EXAMPLES)


@pytest.mark.parametrize("num_branches", [4, 6])
def test_choices(log_likelihoods, num_branches):
    total, count = call(make_loss("choices", num_branches), make_batch(EXAMPLES, num_rows=8))
    expected = 0.0
    for sums, example in zip(log_likelihoods, EXAMPLES, strict=True):
        scores = sums / [len(branch) for branch in example.branches]
        expected -= scores[example.answer] - np.log(np.exp(scores).sum())
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 6


@pytest.mark.parametrize("name", ["answer", "choices"])
def test_gradients_are_finite_with_padding_rows_and_unequal_numbers_of_choices(name):
    graph, adapters, frozen = split_model(adapted())
    loss, batch = make_loss(name, 5), make_batch(EXAMPLES, num_rows=8)

    def total(adapters):
        model: Any = join_model(graph, adapters, frozen)
        return loss(model, batch)[0]

    grads = jax.jit(jax.grad(total))(adapters)
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all()
        assert grad.any()


@pytest.mark.parametrize("name", ["answer", "choices"])
def test_packed_examples_have_their_own_losses_and_gradients(name):
    """Rows of several examples against every example in a row of its own; each alone, and all together."""
    graph, adapters, frozen = split_model(adapted())
    examples = [right_branch_only(example) for example in EXAMPLES] if name == "answer" else EXAMPLES
    loss, sizes = make_loss(name, 5), {"width": 96, "num_targets": 64, "num_documents": 4}
    packed = make_rows([examples[:1], examples[1:4], examples[4:]], num_rows=4, **sizes)

    def total(adapters, batch):
        return loss(join_model(graph, adapters, frozen), batch)

    value_and_grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, count), grads = value_and_grad(adapters, packed)
    (plain, plain_count), plain_grads = value_and_grad(adapters, make_batch(examples))
    assert count == plain_count
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    chex.assert_trees_all_close(grads, plain_grads, atol=1e-6 * max(abs(g).max() for g in jax.tree.leaves(grads)))
    # One example's loss does not feel what else is in its row.
    for row, place, example in ((0, 0, 0), (1, 0, 1), (1, 2, 3), (2, 1, 5)):
        others = packed.owner != place
        others[[r for r in range(4) if r != row]] = True
        answer = np.full_like(packed.answer, -1)
        answer[row, place] = packed.answer[row, place]
        only = packed._replace(branch=np.where(others, -1, packed.branch), answer=answer)
        (value, _), grads = value_and_grad(adapters, only)
        (plain, _), plain_grads = value_and_grad(adapters, make_batch([examples[example]]))
        np.testing.assert_allclose(value, plain, rtol=1e-6)
        chex.assert_trees_all_close(grads, plain_grads, atol=1e-6 * max(abs(g).max() for g in jax.tree.leaves(grads)))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"loss='x' is unknown. Known losses: answer, choices"):
        make_loss("x", 4)
