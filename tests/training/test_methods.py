"""Methods and schedules by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax.optim import LoraRiteState, RiemannianState, StableLoraState
from stable_lora_jax.optim.pairs import find_states
from stable_lora_jax.training import METHODS, SCHEDULES, learning_rate_schedule, make_optimizer

PARAMS = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.zeros((2, 4))}


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("cosine", 0.25, 0.0), ("linear", 0.25, 0.0), ("constant", 0.5, 0.5)]
)
def test_schedules(kind, middle, end):
    rate = learning_rate_schedule(0.5, 30, 10, kind)
    # Rises from 0; at half of the decay cosine and linear meet.
    np.testing.assert_allclose(
        [float(np.asarray(rate(s))) for s in (0, 5, 10, 20, 30)], [0, 0.25, 0.5, middle, end], atol=1e-7
    )
    assert learning_rate_schedule(0.5, 30, 0, kind)(0) == 0.5


def test_clip_acts():
    optimizer = make_optimizer("adamw", 0.1, lam=0.0, ratio=4.0, weight_decay=0.0, clip_norm=1.0)
    state = optimizer.init(PARAMS)
    _, state = optimizer.update({"lora_a": jnp.full((8, 2), 30.0), "lora_b": jnp.full((2, 4), 40.0)}, state, PARAMS)
    (adam,) = find_states(state, optax.ScaleByAdamState)
    # The first moment is a tenth of the clipped gradient, whose norm is 1.
    np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1, rtol=1e-6)


def first_step(method, clip_norm=1.0):
    """A step from `PARAMS`, with gradients 0.1 and -0.2."""
    optimizer = make_optimizer(method, 0.01, lam=0.25, ratio=4.0, weight_decay=0.0, clip_norm=clip_norm)
    grads = {"lora_a": jnp.full((8, 2), 0.1), "lora_b": jnp.full((2, 4), -0.2)}
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize("method", METHODS)
def test_infinity_clips_nothing(method):
    (unclipped, state), (wide, _) = first_step(method, math.inf), first_step(method, 1e6)
    jax.tree.map(np.testing.assert_array_equal, unclipped, wide)
    assert all(rite.clip_factor == 1 for rite in find_states(state, LoraRiteState))


def test_flags_belong_to_stable_lora_alone():
    for method in METHODS:
        _, state = first_step(method)
        assert len(find_states(state, StableLoraState)) == (method == "stable-lora")


def test_each_method_is_the_one_it_names():
    steps = {method: first_step(method)[0] for method in METHODS}
    adamw = steps["adamw"]
    np.testing.assert_allclose(adamw["lora_a"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(steps["lora-plus"]["lora_a"], adamw["lora_a"])
    np.testing.assert_allclose(steps["lora-plus"]["lora_b"], 4 * adamw["lora_b"])
    (riemannian,) = find_states(first_step("riemannian")[1], RiemannianState)
    # With B = 0 the gradient of A is divided by 0.01; the first moment is a tenth of that.
    np.testing.assert_allclose(riemannian.mu["lora_a"], 0.1 * 0.1 / 0.01, rtol=1e-4)
    (rite,) = find_states(first_step("lora-rite", clip_norm=0.01)[1], LoraRiteState)
    assert rite.clip_factor < 0.1


def test_stable_lora_is_adamw_and_the_shrink():
    steps = {method: first_step(method)[0] for method in ("adamw", "stable-lora")}
    np.testing.assert_array_equal(steps["stable-lora"]["lora_b"], steps["adamw"]["lora_b"])
    # A = 1 loses a quarter.
    np.testing.assert_allclose(steps["stable-lora"]["lora_a"], steps["adamw"]["lora_a"] - 0.25, atol=1e-7)


def updates_of(params, **changes):
    defaults = {"lam": 0.25, "ratio": 4.0, "weight_decay": 0.0, "clip_norm": 1.0}
    optimizer = make_optimizer("stable-lora", 0.01, **defaults | changes)
    return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]


def test_decay_of_a_alone():
    params = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))}
    updates = updates_of(params, lam=0.0, weight_decay=10.0, decay_only_a=True)
    np.testing.assert_allclose(updates["lora_a"], -0.01 * 10, rtol=1e-6)
    np.testing.assert_array_equal(updates["lora_b"], 0)
    with pytest.raises(ValueError, match="decay_only_a is for adamw and stable-lora, not for lora-plus"):
        make_optimizer("lora-plus", 0.1, lam=0, ratio=4.0, weight_decay=1.0, clip_norm=1.0, decay_only_a=True)


@pytest.mark.parametrize(("stop", "shrink"), [(True, 0.0), (False, 0.25)])
def test_the_shrink_goes_on_only_if_asked_to(stop, shrink):
    stable = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.full((2, 4), 9.0)}
    np.testing.assert_allclose(updates_of(stable, stop_when_stable=stop)["lora_a"], -shrink, atol=1e-7)


def test_errors():
    with pytest.raises(ValueError, match=f"schedule='x' is unknown.*{', '.join(SCHEDULES)}"):
        learning_rate_schedule(0.5, 30, 10, "x")
    for warmup in (-1, 30):
        with pytest.raises(ValueError, match=rf"warmup_steps={warmup} is not in \[0, total_steps=30\)"):
            learning_rate_schedule(0.5, 30, warmup, "cosine")
    with pytest.raises(ValueError, match=f"method='x' is unknown.*{', '.join(METHODS)}"):
        make_optimizer("x", 0.1, lam=0.0, ratio=4.0, weight_decay=0.0, clip_norm=1.0)
    with pytest.raises(ValueError, match=r"lam=1.5 is not in \[0, 1\)"):
        make_optimizer("stable-lora", 0.1, lam=1.5, ratio=4.0, weight_decay=0.0, clip_norm=1.0)
