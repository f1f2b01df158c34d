"""Every public transformation x every property of an Optax citizen."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stable_lora_jax import (
    lora_labels,
    lora_plus,
    lora_rite,
    riemannian_adamw,
    scale_by_lora_rite,
    scale_by_riemannian,
    stable_lora_shrink,
)
from tests.optim.problems import PROBLEMS
from tests.optim.rows import ROWS


# The same objects at every call, as what is compiled for one test then serves the others.
@functools.cache
def _problem(name):
    params, loss = PROBLEMS[name]()
    return params, jax.jit(loss)


@functools.cache
def _transformation(row):
    make, rate = ROWS[row]
    return make(rate)


def _case(row, problem):
    return (*ROWS[row], *_problem(problem))


def _moved(tx, params, state, gradient, steps):
    """Returns the parameters and the state after some steps, as one loop: the update is compiled once."""

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, state))


@functools.partial(jax.jit, static_argnames=("tx", "loss"))
def _train(tx, params, state, loss, steps):
    return _moved(tx, params, state, jax.grad(loss), steps)


def _assert_close(row, ours, expected):
    """Leaf by leaf in the Frobenius norm. LoRA-RITE scales weak directions, and their rounding, up by up to 1000."""
    tolerance = 5e-3 if "rite" in row else 1e-4

    def check(x, y):
        x, y = np.float64(x), np.float64(y)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-7

    jax.tree.map(check, ours, expected)


# A module's parameter: the tests of a row come one after the other, in one process, and share what is compiled.
rows = pytest.mark.parametrize("row", ROWS, scope="module")

# name -> (from A: (stack, n, r) and B: (stack, r, m) to this layout, back again)
LAYOUTS = {
    "plain": (lambda x: x,) * 2,
    "torch": (lambda x: np.swapaxes(x, -1, -2),) * 2,
    "einsum": (
        lambda x: x.reshape(8, 2, 4, 6) if x.shape == (8, 2, 24) else x,
        lambda x: x.reshape(8, 2, 24) if x.shape == (8, 2, 4, 6) else x,
    ),
    "stack axis 1": (lambda x: np.moveaxis(x, 0, 1), lambda x: np.moveaxis(x, 1, 0)),
}


def _stack(layout):
    """Returns (parameters, gradients): eight pairs in two leaves."""
    to, _ = LAYOUTS[layout]
    rng = np.random.default_rng(5)
    pairs = [{"lora_a": rng.normal(size=(8, 16, 2)), "lora_b": rng.normal(size=(8, 2, 24))} for _ in range(2)]
    return jax.tree.map(lambda x: to(np.float32(x)), pairs)


def _three_steps(row, layout):
    """Returns a function of such parameters and gradients: how far three steps move, and the state after them."""
    make, rate = ROWS[row]
    tx = make(rate, stack_axes=(1,) if layout == "stack axis 1" else (0,))

    def moves(params, grads):
        moved, state = _moved(tx, params, tx.init(params), lambda _: grads, 3)
        return jax.tree.map(jnp.subtract, moved, params), state

    return moves


@functools.cache
def _expected_moves(row):
    return jax.jit(_three_steps(row, "plain"))(*_stack("plain"))


@rows
@pytest.mark.parametrize("problem", PROBLEMS)
def test_converges(row, problem):
    tx, (params, loss) = _transformation(row), _problem(problem)
    trained, _ = _train(tx, params, tx.init(params), loss, 200)
    assert loss(trained) < 0.1 * loss(params)
    if problem == "mixed":
        np.testing.assert_allclose(trained["v"]["kernel"], params["v"]["kernel"], rtol=1e-2)


@rows
def test_jitted_equals_eager_and_compiles_once(row):
    # Every shape that is met eagerly is a program for every operation: few of them, and not in the order of names.
    rng = np.random.default_rng(6)
    shapes = {"v": {"lora_a": (6, 2), "lora_b": (2, 6)}, "q": {"lora_a": (4, 2), "lora_b": (2, 4)}, "bias": (6,)}
    params, *steps = (
        jax.tree.map(lambda shape: jnp.float32(rng.normal(size=shape)), shapes, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(3)
    )
    make, rate = ROWS[row]
    tx = make(rate)
    update = jax.jit(tx.update)
    eager = jitted = tx.init(params)
    for grads in steps:
        expected, eager = tx.update(grads, eager, params)
        updates, jitted = update(grads, jitted, params)
        _assert_close(row, updates, expected)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1


@rows
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_dtypes_and_trains_in_low_precision(row, dtype):
    tx, (params, loss) = _transformation(row), _problem("asymmetric")
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, jax.eval_shape(jax.grad(loss), params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    trained, _ = _train(tx, params, state, loss, 100)
    chex.assert_tree_all_finite(trained)
    assert loss(trained) < 0.9 * loss(params)


@rows
def test_init_refuses_what_is_no_pair(row):
    make, rate = ROWS[row]
    with pytest.raises(ValueError, match="A without its B"):
        make(rate).init({"q": {"lora_a": jnp.ones((4, 2))}})
    with pytest.raises(ValueError, match="No LoRA adapter found"):
        make(rate).init({"kernel": jnp.ones((4, 2))})


@rows
def test_init_needs_only_shapes(row):
    tx, (params, _) = _transformation(row), _problem("asymmetric")
    chex.assert_trees_all_equal(tx.init(jax.eval_shape(lambda: params)), tx.init(params))


@rows
def test_optax_tells_which_parts_of_the_state_are_like_the_parameters(row, eight_devices):
    mesh = jax.make_mesh((8,), ("fsdp",), devices=eight_devices, axis_types=(AxisType.Auto,))
    (make, rate), params = ROWS[row], _stack("plain")
    tx = make(rate, stack_axes=(0,))
    state = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    shardings = optax.tree.map_params(tx, lambda _: split, state, transform_non_params=lambda _: whole)
    placed = jax.jit(tx.init, out_shardings=shardings)(params)
    for path, leaf in jax.tree.leaves_with_path(placed):
        moment = any(getattr(key, "name", None) in ("mu", "nu", "first", "second") for key in path)
        assert leaf.sharding.is_equivalent_to(split if moment and "rite" not in row else whole, leaf.ndim), path


@rows
def test_state_keeps_its_structure_under_cond(row):
    make, rate, params, loss = _case(row, "stacked")
    tx = make(rate)

    @jax.jit
    def maybe(take, params, state):
        def step():
            return tx.update(jax.grad(loss)(params), state, params)

        return jax.lax.cond(take, step, lambda: (jax.tree.map(jnp.zeros_like, params), state))

    state = tx.init(params)
    for take in (True, False, True):
        updates, state = maybe(take, params, state)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite(params)


@rows
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_equals_one_device_on_eight(row, axis_type, eight_devices):
    mesh = jax.make_mesh((8,), ("fsdp",), devices=eight_devices, axis_types=(axis_type,))
    expected, expected_state = _expected_moves(row)
    # Split over the stack; and over the fan-in of A and the fan-out of B.
    for a, b in (((P("fsdp"),) * 2), (P(None, "fsdp"), P(None, None, "fsdp"))):
        specs = {"lora_a": NamedSharding(mesh, a), "lora_b": NamedSharding(mesh, b)}
        placed = jax.device_put(_stack("plain"), [specs, specs])
        moves, state = jax.jit(_three_steps(row, "plain"), out_shardings=(specs, None))(*placed)
        chex.assert_trees_all_close(moves, expected, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)


@rows
def test_composes_with_multi_steps(row):
    plain, (params, loss) = _transformation(row), _problem("stacked")
    grads = jax.grad(loss)(params)
    tx = optax.MultiSteps(plain, every_k_schedule=2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates, state = update(grads, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, params))
    updates, state = update(grads, state, params)
    moved, _ = _train(plain, params, plain.init(params), loss, 1)
    _assert_close(row, updates, jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), moved, params))


@rows
def test_takes_a_schedule_and_an_injected_rate(row):
    make, rate, params, loss = _case(row, "stacked")
    schedule = optax.linear_schedule(rate, rate / 2, 4)
    scheduled, injected = make(schedule), optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(rate)
    states = scheduled.init(params), injected.init(params)
    updates_of, gradient = (jax.jit(scheduled.update), jax.jit(injected.update)), jax.grad(loss)
    for step in range(3):
        grads = gradient(params)
        states[1].hyperparams["learning_rate"] = schedule(step)
        updates, first = updates_of[0](grads, states[0], params)
        others, second = updates_of[1](grads, states[1], params)
        _assert_close(row, updates, others)
        params, states = optax.apply_updates(params, updates), (first, second)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.inject_hyperparams(lora_plus)(1e-2, ratio=4.0),
        lambda: optax.inject_hyperparams(scale_by_riemannian)(reg=1e-2),
        lambda: optax.inject_hyperparams(riemannian_adamw)(1e-2),
        lambda: optax.inject_hyperparams(lora_rite)(1e-2, max_step_a=0.1),
        lambda: optax.inject_hyperparams(scale_by_lora_rite)(),
        lambda: optax.inject_hyperparams(stable_lora_shrink)(lam=0.005),
    ],
)
def test_every_number_may_be_injected(make):
    params, loss = _problem("asymmetric")
    tx = make()
    updates, _ = jax.jit(tx.update)(jax.grad(loss)(params), tx.init(params), params)
    chex.assert_tree_all_finite(updates)


def test_injected_numbers_may_stay_float32_and_labels_may_be_a_function():
    params, loss = _problem("asymmetric")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    inject = functools.partial(optax.inject_hyperparams, static_args=("labels", "stack_axes"))
    tx = inject(riemannian_adamw, hyperparam_dtype=jnp.float32)(1e-2, labels=lora_labels, stack_axes=lambda name: ())
    updates, state = jax.jit(tx.update)(jax.grad(loss)(params), tx.init(params), params)
    chex.assert_tree_all_finite(updates)
    assert state.hyperparams["b2"] == np.float32(0.999)


@rows
def test_works_masked_and_partitioned(row):
    make, rate, params, loss = _case(row, "mixed")
    grads = jax.grad(loss)(params)
    adapters = {
        "v": {"lora_a": True, "lora_b": True, "kernel": False, "bias": False},
        "q": {"lora_a": True, "lora_b": True},
    }
    frozen = jax.tree.map(lambda is_adapter: not is_adapter, adapters)
    masked = optax.chain(optax.masked(make(rate), adapters), optax.masked(optax.set_to_zero(), frozen))
    labels = jax.tree.map(lambda is_adapter: "train" if is_adapter else "freeze", adapters)
    partitioned = optax.partition({"train": make(rate), "freeze": optax.set_to_zero()}, labels)

    def pairs_of(tree):
        return {name: {side: pair[side] for side in ("lora_a", "lora_b")} for name, pair in tree.items()}

    @jax.jit
    def updates_of_all(grads, params):
        alone = pairs_of(grads), pairs_of(params)
        cases = (make(rate), *alone), (masked, grads, params), (partitioned, grads, params)
        return [tx.update(grads, tx.init(params), params)[0] for tx, grads, params in cases]

    # In one program, so that what is the same is compiled once.
    expected, *others = updates_of_all(grads, params)
    for updates in others:
        assert not updates["v"]["bias"].any()
        _assert_close(row, pairs_of(updates), expected)


@rows
def test_resumes_bitwise_from_a_checkpoint(row, tmp_path):
    tx, (params, loss) = _transformation(row), _problem("asymmetric")
    params, state = _train(tx, params, tx.init(params), loss, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", (params, state))
    chex.assert_trees_all_equal(restored, (params, state))
    uncommitted = jax.tree.map(np.asarray, restored)  # for which nothing is compiled anew
    chex.assert_trees_all_equal(_train(tx, *uncommitted, loss, 1), _train(tx, params, state, loss, 1))


@rows
def test_vmaps_over_a_batch_of_adapters(row):
    make, rate, params, loss = _case(row, "stacked")
    scales = np.float32([1.0, 0.5, 2.0])
    batch, rates = jax.tree.map(lambda p: np.multiply.outer(scales, p), params), rate * scales

    def one(params, rate):
        tx = make(rate)
        return _moved(tx, params, tx.init(params), jax.grad(loss), 2)[0]

    one_by_one, together = jax.jit(one), jax.jit(jax.vmap(one))(batch, rates)
    for i in range(3):
        alone = one_by_one(jax.tree.map(lambda p, i=i: p[i], batch), rates[i])
        _assert_close(row, jax.tree.map(lambda p, i=i: p[i], together), alone)


@pytest.mark.parametrize("layout", ["torch", "einsum", "stack axis 1"])
@rows
def test_a_pair_in_another_layout_moves_the_same(row, layout):
    _, back = LAYOUTS[layout]
    moves, _ = jax.jit(_three_steps(row, layout))(*_stack(layout))
    expected, _ = _expected_moves(row)
    _assert_close(row, jax.tree.map(lambda p: back(np.asarray(p)), moves), expected)


@rows
def test_works_in_an_nnx_optimizer(row):
    make, rate = ROWS[row]
    params, grads = jax.tree.map(jnp.asarray, _stack("plain"))
    model = nnx.LoRA(16, 2, 24, rngs=nnx.Rngs(0))
    model.lora_a, model.lora_b = (nnx.LoRAParam(params[side]) for side in ("lora_a", "lora_b"))
    optimizer = nnx.Optimizer(model, make(rate, stack_axes=(0,)), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.State({side: nnx.LoRAParam(grads[side]) for side in grads}))

    for _ in range(3):
        step(model, optimizer)
    expected, _ = _expected_moves(row)
    moved = {"lora_a": model.lora_a[...], "lora_b": model.lora_b[...]}
    _assert_close(row, jax.tree.map(np.subtract, moved, params), expected)


@rows
def test_needs_params(row):
    tx, (params, _) = _transformation(row), _problem("asymmetric")
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))
