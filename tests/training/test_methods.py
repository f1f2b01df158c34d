"""Methods and schedules by name."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax.optim import StableLoraState
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
    optimizer = make_optimizer("adamw", 0.1, lam=0.0, weight_decay=0.0, clip_norm=1.0)
    state = optimizer.init(PARAMS)
    _, state = optimizer.update({"lora_a": jnp.full((8, 2), 30.0), "lora_b": jnp.full((2, 4), 40.0)}, state, PARAMS)
    (adam,) = find_states(state, optax.ScaleByAdamState)
    # The first moment is a tenth of the clipped gradient, whose norm is 1.
    np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1, rtol=1e-6)


def test_flags_belong_to_stable_lora_alone():
    states = {m: make_optimizer(m, 0.1, lam=0.1, weight_decay=0.0, clip_norm=1.0).init(PARAMS) for m in METHODS}
    assert not find_states(states["adamw"], StableLoraState)
    (flags,) = find_states(states["stable-lora"], StableLoraState)
    assert len(flags.stable) == 1


def test_stable_lora_is_adamw_and_the_shrink():
    grads = {"lora_a": jnp.full((8, 2), 0.1), "lora_b": jnp.full((2, 4), -0.2)}
    steps = {}
    for method in METHODS:
        optimizer = make_optimizer(method, 0.01, lam=0.25, weight_decay=0.0, clip_norm=1.0)
        steps[method], _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(steps["stable-lora"]["lora_b"], steps["adamw"]["lora_b"])
    # A = 1 loses a quarter.
    np.testing.assert_allclose(steps["stable-lora"]["lora_a"], steps["adamw"]["lora_a"] - 0.25, atol=1e-7)


def test_errors():
    with pytest.raises(ValueError, match=f"schedule='x' is unknown.*{', '.join(SCHEDULES)}"):
        learning_rate_schedule(0.5, 30, 10, "x")
    for warmup in (-1, 30):
        with pytest.raises(ValueError, match=rf"warmup_steps={warmup} is not in \[0, total_steps=30\)"):
            learning_rate_schedule(0.5, 30, warmup, "cosine")
    with pytest.raises(ValueError, match=f"method='x' is unknown.*{', '.join(METHODS)}"):
        make_optimizer("x", 0.1, lam=0.0, weight_decay=0.0, clip_norm=1.0)
    with pytest.raises(ValueError, match=r"lam=1.5 is not in \[0, 1\)"):
        make_optimizer("stable-lora", 0.1, lam=1.5, weight_decay=0.0, clip_norm=1.0)
