"""Optax's wrappers around every transformation, on meshes of both kinds, and trees that hold more than arrays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stable_lora_jax import lora_rite, scale_by_lora_rite, scale_by_riemannian, stable_lora, stable_lora_shrink
from tests.optim.rows import ROWS, in_turns

rows = pytest.mark.parametrize("row", ROWS)


def adapters(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": {"lora_a": (8, 16, 2), "lora_b": (8, 2, 24)}, "v": {"lora_a": (16, 2), "lora_b": (2, 8)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


WRAPPERS = {
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda step: optax.chain(tx, optax.scale(step)))(1.0),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=2),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step < 1),
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=1)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
    "inject_hyperparams(stable_lora)": lambda tx: optax.inject_hyperparams(stable_lora, static_args=("inner",))(
        inner=tx, lam=0.01
    ),
    "stable_lora(reduce_on_plateau)": lambda tx: stable_lora(
        optax.chain(tx, optax.contrib.reduce_on_plateau(patience=1)), 0.01
    ),
}


@functools.cache
def _on_one_device(wrapper, row):
    return _two_steps(WRAPPERS[wrapper](_transformation(row)), adapters(), jitted=True)


@functools.cache
def _transformation(row):
    make, rate = ROWS[row]
    return make(rate)


def _two_steps(tx, params, jitted):
    """Returns how far two steps move, with gradients and a loss on the parameters' devices."""
    state = tx.init(params)
    update = jax.jit(tx.update) if jitted else tx.update
    start = params
    for _ in range(2):
        grads = jax.tree.map(lambda p: 0.1 * p, start)
        value = jnp.sum(jnp.square(start["v"]["lora_a"]))
        updates, state = update(grads, state, params, **({"value": value} if _takes_value(tx) else {}))
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda x, y: np.asarray(x - y), params, start)


def _itself(tx):
    return tx


def _takes_value(tx):
    return isinstance(tx, optax.GradientTransformationExtraArgs)


WAYS = [(True, AxisType.Auto), (False, AxisType.Explicit), (True, AxisType.Explicit), (False, AxisType.Auto)]


@pytest.mark.parametrize(
    ("wrapper", "row", "way"),
    in_turns(WRAPPERS, ["stable_lora(adamw)", "riemannian_adamw simultaneous", "lora_rite"], WAYS),
)
def test_wrappers_work_on_both_kinds_of_mesh(wrapper, row, way, eight_devices):
    jitted, axis_type = way
    mesh = jax.make_mesh((8,), ("fsdp",), devices=eight_devices, axis_types=(axis_type,))
    specs = {
        "q": {"lora_a": P("fsdp"), "lora_b": P("fsdp")},
        "v": {"lora_a": P("fsdp"), "lora_b": P(None, "fsdp")},
    }
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), adapters(), specs)
    moved = _two_steps(WRAPPERS[wrapper](_transformation(row)), params, jitted)
    chex.assert_trees_all_close(moved, _on_one_device(wrapper, row), rtol=1e-3, atol=1e-5)


def _foreign(tree, *, of_parameters):
    """Returns `tree` among what modules of Equinox hold; gradients are None there, as from eqx.filter_grad."""
    others = {
        "activation": jax.nn.relu,
        "name": "block",
        "missing": None,
        "count": jnp.arange(3),
        "key": jax.random.key(0),
        "frozen": jnp.ones((4, 4)),
    }
    return {"a": others, **tree, "z": others} if of_parameters else {"a": _nones(others), **tree, "z": _nones(others)}


def _nones(tree):
    return dict.fromkeys(tree)


@rows
def test_a_tree_with_more_than_arrays_moves_like_its_adapters(row):
    tx, params = _transformation(row), adapters()
    grads = jax.tree.map(lambda p: 0.1 * p, adapters(seed=1))
    expected, expected_state = tx.update(grads, tx.init(params), params)
    state = tx.init(_foreign(params, of_parameters=False))  # eqx.filter(model, eqx.is_inexact_array)
    updates, state = tx.update(_foreign(grads, of_parameters=False), state, _foreign(params, of_parameters=True))
    chex.assert_trees_all_equal({name: updates[name] for name in params}, expected)
    assert updates["a"] == updates["z"] == _nones(updates["a"])
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(expected_state))


def test_a_shrink_alone_takes_a_whole_module_at_init_too():
    params = _foreign(adapters(), of_parameters=True)
    for tx in (stable_lora_shrink(0.01), scale_by_riemannian(), scale_by_lora_rite()):
        updates, _ = tx.update(_foreign(adapters(), of_parameters=False), tx.init(params), params)
        assert updates["a"]["frozen"] is None


def test_updates_of_another_structure_are_refused():
    params, tx = adapters(), stable_lora_shrink(0.01)
    with pytest.raises(ValueError, match=r"The updates have 2 leaves and the parameters 4"):
        tx.update({"v": params["v"]}, tx.init(params), params)


@pytest.mark.parametrize(
    ("row", "dtype", "wrapper"),
    in_turns(ROWS, [jnp.bfloat16, jnp.float32], ["apply_if_finite", "conditionally_transform"]),
)
def test_no_dtype_changes_under_x64(row, dtype, wrapper):
    make, rate = ROWS[row]
    with jax.enable_x64(True):
        params = adapters(dtype)
        for wrap in (_itself, WRAPPERS[wrapper]):
            tx = wrap(make(rate))

            @jax.jit
            def many(params, state, tx=tx):
                def step(carry, _):
                    params, state = carry
                    grads = jax.tree.map(lambda p: p / 10, params)
                    updates, state = tx.update(grads, state, params)
                    return (optax.apply_updates(params, updates), state), None

                return jax.lax.scan(step, (params, state), length=2)[0]

            state = tx.init(params)
            update = jax.jit(tx.update)
            grads = jax.tree.map(lambda p: p / 10, params)
            updates, after = update(grads, state, params)
            _, again = update(grads, after, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(again, state)
            assert update._cache_size() == 1, "weak types changed"
            chex.assert_trees_all_equal_shapes_and_dtypes(many(params, state), (params, state))


@rows
def test_16_bit_gradients_of_float32_adapters_give_float32_updates(row):
    tx, params = _transformation(row), adapters()
    grads = jax.tree.map(lambda p: (0.1 * p).astype(jnp.bfloat16), adapters(seed=1))
    updates, state = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    if row in ("lora_plus", "adamw + stable_lora_shrink", "stable_lora(adamw)", "stable_lora(lora_plus)"):
        return  # whose moments are Optax's, averaged with what 16-bit products of the gradients are
    wide, _ = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), tx.init(params), params)
    chex.assert_trees_all_close(updates, wide, rtol=1e-5, atol=1e-8)


def test_lora_rite_inside_the_wrapper_keeps_its_state():
    params = adapters(jnp.bfloat16)
    tx = stable_lora(lora_rite(1e-2), 0.01)
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
