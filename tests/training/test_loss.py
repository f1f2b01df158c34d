"""Both losses against their definitions."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.data import make_batch, right_branch_only
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


def test_unknown_name():
    with pytest.raises(ValueError, match=r"loss='x' is unknown. Known losses: answer, choices"):
        make_loss("x", 4)
