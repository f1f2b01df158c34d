"""The report of norms, gaps and flags, and flags that are opened again."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stable_lora_jax import (
    reset_stability,
    stability,
    stable_lora,
    stable_lora_shrink,
)
from tests.optim.test_stable_lora import LAM, pair, tree


def test_stability_reports_norms_and_gap():
    rng = np.random.default_rng(0)
    params = {"q": pair(rng, b_scale=0.1), "layers": pair(rng, stack=(3,), b_scale=0.1)}
    report = jax.jit(stability)(params, stable_lora_shrink(LAM).init(params))
    one = params["q"]
    np.testing.assert_allclose(report["q/lora"].norm_a, np.linalg.norm(one["lora_a"]), rtol=1e-6)
    gap = (np.linalg.norm(one["lora_a"]) / 24) / (np.linalg.norm(one["lora_b"]) / 12)
    np.testing.assert_allclose(report["q/lora"].gap, gap, rtol=1e-6)
    assert report["layers/lora"].norm_b.shape == (3,)
    fresh = {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 4))}
    assert stability(fresh, stable_lora_shrink(LAM).init(fresh))["lora"].gap == 0


@pytest.mark.parametrize("report", [stability, jax.jit(stability)], ids=["plain", "jitted"])
def test_a_report_outlives_a_state_that_is_donated(report):
    """As in most training loops: history[step] = stability(params, state), then the next step."""
    tx = stable_lora(optax.sgd(0.1), LAM)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = tree()
    state, history = tx.init(params), []
    for _ in range(3):
        history.append(report(params, state))
        params, state = step(params, state)
    for found in history:
        assert all(np.isfinite(each.norm_a).all() and not np.any(each.stable) for each in found.values())


def test_stability_without_a_state_or_with_two_is_refused():
    params, shrink = tree(), stable_lora_shrink(LAM)
    with pytest.raises(ValueError, match=r"holds no StableLoraState.*optimizer.opt_state"):
        stability(params, optax.adamw(1.0).init(params))
    with pytest.raises(ValueError, match="A would shrink twice"):
        stability(params, optax.chain(shrink, shrink).init(params))


def test_stability_of_other_parameters_is_refused():
    params = tree()
    state = stable_lora_shrink(LAM).init({"params": params})
    message = (
        r"flags of the pairs \['params/layers/v/lora', 'params/q/lora'\], params hold \['layers/v/lora', 'q/lora'\]"
    )
    with pytest.raises(ValueError, match=message):
        stability(params, state)
    with pytest.raises(ValueError, match=r"flags of the pairs \['layers/v/lora'\], params hold \['q/lora'\]"):
        stability({"q": params["q"]}, stable_lora_shrink(LAM).init(params))


def test_flags_of_chosen_pairs_open_again():
    params = {name: pair(np.random.default_rng(0), b_scale=9.0, dtype=jnp.bfloat16) for name in ("q", "v")}
    tx = optax.chain(optax.adamw(1e-3), stable_lora_shrink(0.0005))
    grads = jax.tree.map(jnp.zeros_like, params)
    params["v"]["lora_a"] = 99 * params["v"]["lora_a"]
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert [bool(state[1].stable[name]) for name in ("q/lora", "v/lora")] == [True, False]
    assert state[1].pending["v/lora"] < 1
    again = jax.jit(reset_stability, static_argnames="names")(state, names=lambda name: name.startswith("q"))
    assert not again[1].stable["q/lora"]
    chex.assert_trees_all_equal(again[1].pending, state[1].pending)
    chex.assert_trees_all_equal(reset_stability(state)[1].pending, {"q/lora": np.ones(()), "v/lora": np.ones(())})
    chex.assert_trees_all_equal_shapes_and_dtypes(again, state)
    with pytest.raises(ValueError, match=r"no flag to reset: its pairs are \['q/lora', 'v/lora'\]"):
        reset_stability(state, lambda name: name == "k/lora")
    with pytest.raises(ValueError, match=r"no flag to reset: its pairs are \[\]"):
        reset_stability(state[0])


def test_flags_inside_an_nnx_optimizer_open_again():
    model = nnx.LoRA(16, 2, 24, rngs=nnx.Rngs(0))
    model.lora_b[...] = jnp.full((2, 24), 9.0)
    optimizer = nnx.Optimizer(model, stable_lora(optax.adamw(1e-3), 0.01), wrt=nnx.LoRAParam)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.LoRAParam)))
    assert stability(nnx.state(model, nnx.LoRAParam), optimizer.opt_state)["lora"].stable
    optimizer.opt_state = nnx.data(reset_stability(optimizer.opt_state))
    assert not stability(nnx.state(model, nnx.LoRAParam), optimizer.opt_state)["lora"].stable


@pytest.mark.parametrize(
    ("a", "b", "stack_axes"),
    [
        ((16, 3, 4), (4, 3, 8), (1,)),
        ((16, 3, 4), (4, 3, 8), ()),
        ((4, 16, 4), (4, 4, 8), (0,)),
        ((5, 12, 4), (4, 6), lambda name: (0,)),  # five A share a B
        ((5, 12, 4), (4, 6), ()),
    ],
)
def test_the_flags_tell_what_is_a_stack(a, b, stack_axes):
    rng = np.random.default_rng(0)
    params = {"w_lora_a": jnp.asarray(rng.normal(size=a)), "w_lora_b": jnp.asarray(rng.normal(size=b))}
    state = stable_lora_shrink(LAM, stack_axes=stack_axes).init(params)
    told = stability(params, state)["w_lora"]
    np.testing.assert_array_equal(told.gap, stability(params, state, stack_axes=stack_axes)["w_lora"].gap)
    assert told.gap.shape == told.stable.shape
