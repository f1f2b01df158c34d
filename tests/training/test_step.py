"""The step: the right gradient, however it is split over parts and devices, and nothing else moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax.data import make_batch, right_branch_only
from stable_lora_jax.training import (
    Loss,
    TrainState,
    compile_step,
    init_state,
    join_model,
    make_loss,
    make_mesh,
    make_optimizer,
    split_model,
    suits_unrolling,
)
from stable_lora_jax.training.sharding import batch_sharding, check_decoder, replicated
from stable_lora_jax.training.step import place
from tests.training.tiny_runs import adapted, naive_log_likelihoods, questions, trees_equal

# Plain gradient descent of rate 1: the step is the gradient.
SGD = optax.sgd(1.0)
HEADS = {"num_heads": 8, "num_kv_heads": 4}  # divided by every mesh below
STABLE = make_optimizer("stable-lora", 1e-3, lam=0.15, ratio=4.0, weight_decay=0.0, clip_norm=1.0)


def examples_for(loss: str, count: int = 8, seed: int = 0):
    made = questions(count, seed=seed)
    return [right_branch_only(example) for example in made] if loss == "answer" else made


class Run:
    """A compiled step and what it needs."""

    def __init__(
        self,
        optimizer=SGD,
        *,
        mesh=None,
        loss: str | Loss = "answer",
        dropout=0.0,
        b_std=0.05,
        **options: Any,
    ):
        self.mesh = mesh or make_mesh()
        self.model = adapted(dropout=dropout, b_std=b_std, **HEADS)
        self.graph, adapters, frozen = split_model(self.model)
        self.frozen = jax.device_put(frozen, place(self.mesh, frozen))
        loss = make_loss(loss, 4) if isinstance(loss, str) else loss
        self.step = compile_step(self.graph, loss, optimizer, mesh=self.mesh, frozen=self.frozen, **options)
        self.start = jax.device_put(init_state(adapters, optimizer), replicated(self.mesh))

    def __call__(self, batch, state=None):
        """The step from a copy, because the state is donated."""
        state = jax.tree.map(jnp.copy, self.start if state is None else state)
        return self.step(state, self.frozen, jax.device_put(batch, batch_sharding(self.mesh)))


def test_gradient_is_that_of_the_loss_written_naively():
    examples = examples_for("answer", 2)
    run = Run()
    state, metrics = run(make_batch(examples))

    @jax.jit
    @jax.value_and_grad
    def naive(adapters):
        model: Any = join_model(run.graph, adapters, run.frozen)
        sums = [naive_log_likelihoods(model, example)[0] for example in examples]
        return -sum(sums) / sum(example.num_targets for example in examples)

    loss, grads = naive(run.start.adapters)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-4)
    for before, after, grad in zip(*map(jax.tree.leaves, (run.start.adapters, state.adapters, grads)), strict=True):
        np.testing.assert_allclose(before - after, grad, atol=1e-5)  # float32 sums in another order
        assert jnp.abs(grad).max() > 1e-3


def test_only_adapters_move():
    run = Run(STABLE, dropout=0.3)
    before = jax.tree.map(np.array, run.frozen.params)
    state = run.start
    for seed in range(3):
        state, _ = run(make_batch(examples_for("answer", seed=seed), width=16, num_targets=32), state)
    assert trees_equal(run.frozen.params, before)
    assert int(state.step) == 3
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.adapters, run.start.adapters)
    assert jax.tree.all(moved)


@pytest.mark.parametrize(("loss", "parts"), [("answer", (2, 4)), ("choices", (4,))])
def test_parts_add_up_to_the_whole(loss, parts):
    batch = make_batch(examples_for(loss))
    assert len(set((batch.branch >= 0).sum(1).tolist())) > 2  # a mean of means would be another number
    results = {accumulate: Run(loss=loss, accumulate=accumulate)(batch) for accumulate in (1, *parts)}
    for accumulate in parts:
        (whole, one), (summed, other) = results[1], results[accumulate]
        np.testing.assert_allclose(other.loss, one.loss, rtol=1e-6)
        for x, y in zip(jax.tree.leaves(whole.adapters), jax.tree.leaves(summed.adapters), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("sizes", [(), (2, 1, 2)])
@pytest.mark.parametrize(("dropout", "accumulate"), [(0.0, 1), (0.5, 2)])
def test_layers_written_out_compute_the_same(sizes, dropout, accumulate):
    batch = make_batch(examples_for("answer"))
    options: Any = {"mesh": make_mesh(*sizes), "dropout": dropout, "accumulate": accumulate}
    looped, out = (Run(unroll=unroll, **options) for unroll in (False, True))
    (state, metrics), (same, others) = looped(batch), out(batch)
    np.testing.assert_allclose(metrics.loss, others.loss, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(same.adapters), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)  # float32 sums in another order
    programs = [run.step.lower(run.start, run.frozen, batch).as_text() for run in (looped, out)]
    assert not suits_unrolling(looped.mesh)  # no GPU
    loops = [text.count("stablehlo.while") for text in programs]
    assert loops[0] == loops[1] + 2  # over layers, forward and back; others draw random numbers or go through parts


def test_dropout_is_a_function_of_the_step():
    run, batch = Run(dropout=0.5), make_batch(examples_for("answer"))
    (first, one), (again, same) = run(batch), run(batch)
    assert one.loss == same.loss
    assert trees_equal(first.adapters, again.adapters)
    later = TrainState(jnp.ones((), jnp.int32), run.start.adapters, run.start.opt_state)
    assert run(batch, later)[1].loss != one.loss


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_differs_between_parts(dropout):
    example = examples_for("answer", 1)[0]
    part_of_row = np.arange(2, dtype=np.int32)[:, None]  # the same row in both parts
    batch = make_batch([example] * 2)._replace(answer=part_of_row)
    losses = []
    for part in range(2):

        def loss_of_part(model, batch, part=part):
            total, _ = make_loss("answer", 1)(model, batch)
            return jnp.where(batch.answer[0, 0] == part, total, 0.0), jnp.ones(())

        losses.append(float(Run(loss=loss_of_part, accumulate=2, dropout=dropout, b_std=0.5)(batch)[1].loss))
    assert (losses[0] != losses[1]) == bool(dropout)


def test_one_compilation_per_shape_and_the_state_is_donated():
    run = Run(STABLE)
    shapes = [{"width": 16, "num_targets": 8}, {"width": 24, "num_targets": 8}]
    state = jax.tree.map(jnp.copy, run.start)
    for kwargs in (shapes[0], shapes[1], *shapes * 2):
        old = state
        batch = jax.device_put(make_batch(examples_for("answer"), **kwargs), batch_sharding(run.mesh))
        state, _ = run.step(state, run.frozen, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.adapters))
    assert run.step._cache_size() == 2
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.frozen.params))


def follow(mesh, accumulate=1):
    """Losses and flags over 10 steps in which some pairs become stable."""
    run = Run(STABLE, mesh=mesh, accumulate=accumulate)
    check_decoder(run.mesh, run.model)
    state, losses, flags = run.start, [], []
    for seed in range(10):
        batch = make_batch(examples_for("answer", seed=seed), width=16, num_targets=8)
        state, metrics = run(batch, state)
        losses.append(float(metrics.loss))
        flags.append(jax.tree.map(np.asarray, metrics.stable))
    return losses, flags


@pytest.fixture(scope="module")
def single_device():
    losses, flags = follow(None)
    counts = [sum(int(flag.sum()) for flag in step.values()) for step in flags]
    assert 0 == counts[0] < counts[-1] < 6, counts
    return losses, flags


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [((8, 1, 1), 1), ((1, 8, 1), 1), ((2, 2, 2), 1), ((1, 1, 4), 1), ((2, 2, 2), 2)],
)
def test_every_mesh_computes_the_same(single_device, sizes, accumulate):
    losses, flags = follow(make_mesh(*sizes), accumulate)
    np.testing.assert_allclose(losses, single_device[0], rtol=1e-5)  # float32 sums in another order
    assert trees_equal(flags, single_device[1])


def test_the_program_splits_batch_and_frozen_weights_and_repeats_adapters():
    run = Run(STABLE, mesh=make_mesh(2, 2, 2), loss="choices")
    inputs: Any = (run.start, run.frozen, make_batch(examples_for("choices"), width=32))
    compiled = run.step.lower(*inputs).compile()
    shardings, _ = compiled.input_shardings  # of what comes, wherever it lies now
    assert all(len(sharding.device_set) == 8 for sharding in jax.tree.leaves(shardings))
    state, frozen, batch = jax.tree.map(
        lambda sharding, x: sharding and sharding.shard_shape(x.shape),  # None: this loss does not read it
        *(shardings, inputs),
        is_leaf=lambda sharding: sharding is None,
    )
    attention = frozen.params["layers"]["self_attn"]
    assert attention["q_proj"]["base"]["kernel"] == (3, 12, 16)
    assert attention["k_proj"]["kernel"] == (3, 12, 8)
    assert attention["o_proj"]["kernel"] == (3, 16, 12)
    assert frozen.params["layers"]["mlp"]["up_proj"]["kernel"] == (3, 12, 20)
    assert frozen.params["layers"]["mlp"]["down_proj"]["kernel"] == (3, 20, 12)
    assert frozen.params["embed_tokens"]["embedding"] == (32, 12)
    assert frozen.params["norm"]["scale"] == (24,)
    assert batch.tokens == (2, 32)
    jax.tree.map(lambda x, shape: np.testing.assert_equal(shape, x.shape), run.start, state)


def test_mesh_errors():
    with pytest.raises(ValueError, match=r"data=3, fsdp=3, tensor=1 needs 9 devices; there are 8"):
        make_mesh(3, 3)
    with pytest.raises(ValueError, match=r"data=0, fsdp=1, tensor=1.*at least 1"):
        make_mesh(0)
    with pytest.raises(
        ValueError, match=r"mesh axis fsdp=5 does not divide the 24 of embed_tokens.embedding \(64, 24\)"
    ):
        Run(mesh=make_mesh(fsdp=5))
    with pytest.raises(ValueError, match=r"mesh axis tensor=3 does not divide the 64 of embed_tokens.embedding"):
        Run(mesh=make_mesh(tensor=3))
