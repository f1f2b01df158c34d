"""Every public transformation x every property of an Optax citizen. Adding an optimizer means adding a row."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stable_lora_jax import (
    lora_plus,
    lora_rite,
    riemannian_adamw,
    scale_by_lora_rite,
    scale_by_riemannian,
    stable_lora,
    stable_lora_shrink,
)
from tests.optim.problems import PROBLEMS

# name -> (transformation of a learning rate and what `find_pairs` takes, a learning rate at which it converges in 200
# steps). LoRA-RITE runs with a limit on its steps: without one B, small and of low rank at first, throws A far away,
# here and in the float64 specification alike.
ROWS = {
    "adamw + stable_lora_shrink": (lambda lr, **o: optax.chain(optax.adamw(lr), stable_lora_shrink(0.005, **o)), 3e-2),
    "stable_lora(adamw)": (lambda lr, **o: stable_lora(optax.adamw(lr), 0.005, **o), 3e-2),
    "lora_plus": (lambda lr, **o: lora_plus(lr, ratio=4.0, weight_decay=1e-3, **o), 2e-2),
    "scale_by_riemannian + sgd": (lambda lr, **o: optax.chain(scale_by_riemannian(1e-2, **o), optax.sgd(lr)), 1.0),
    "riemannian_adamw simultaneous": (lambda lr, **o: riemannian_adamw(lr, weight_decay=1e-3, **o), 3e-2),
    "riemannian_adamw sequential": (
        lambda lr, **o: riemannian_adamw(lr, ordering="sequential", eps=1e-6, bias_correction=False, **o),
        1e-2,
    ),
    "scale_by_lora_rite": (
        lambda lr, **o: optax.chain(
            scale_by_lora_rite(update_skipping=0.0, **o),
            optax.scale_by_learning_rate(lr),
            optax.clip_by_global_norm(0.3),
        ),
        2e-2,
    ),
    "lora_rite": (lambda lr, **o: lora_rite(lr, weight_decay=1e-3, update_skipping=0.0, max_step_a=0.1, **o), 2e-2),
    "lora_rite, every option": (
        lambda lr, **o: lora_rite(
            lr,
            update_capping=1.0,
            escape=True,
            balance=True,
            max_step_a=0.1,
            update_skipping=5.0,
            **o,
        ),
        2e-2,
    ),
    "stable_lora(lora_plus)": (lambda lr, **o: stable_lora(lora_plus(lr, ratio=4.0, **o), 0.005, **o), 2e-2),
    "stable_lora(riemannian_adamw)": (lambda lr, **o: stable_lora(riemannian_adamw(lr, **o), 0.005, **o), 3e-2),
    "stable_lora(lora_rite)": (
        lambda lr, **o: stable_lora(lora_rite(lr, update_skipping=0.0, max_step_a=0.1, **o), 0.005, **o),
        2e-2,
    ),
}


def _case(row, problem="asymmetric"):
    make, rate = ROWS[row]
    return (make, rate, *PROBLEMS[problem]())


def _train(tx, params, loss, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def _assert_close(row, ours, expected):
    """Leaf by leaf in the Frobenius norm. LoRA-RITE scales weak directions, and their rounding, up by up to 1000."""
    tolerance = 5e-3 if "rite" in row else 1e-4

    def check(x, y):
        assert np.linalg.norm(np.float64(x - y)) <= tolerance * np.linalg.norm(np.float64(y)) + 1e-7

    jax.tree.map(check, ours, expected)


rows = pytest.mark.parametrize("row", ROWS)


@rows
@pytest.mark.parametrize("problem", PROBLEMS)
def test_converges(row, problem):
    make, rate, params, loss = _case(row, problem)
    trained, _ = _train(make(rate), params, loss, 200)
    assert loss(trained) < 0.1 * loss(params)
    if problem == "mixed":
        np.testing.assert_allclose(trained["v"]["kernel"], params["v"]["kernel"], rtol=1e-2)


@rows
def test_jitted_equals_eager_and_compiles_once(row):
    make, rate, params, loss = _case(row, "mixed")
    tx = make(rate)
    update = jax.jit(tx.update)
    eager, jitted = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(2):
        grads = jax.grad(loss)(eager[0])
        updates, state = tx.update(grads, eager[1], eager[0])
        eager = optax.apply_updates(eager[0], updates), state
        updates, state = update(grads, jitted[1], jitted[0])
        jitted = optax.apply_updates(jitted[0], updates), state
    _assert_close(row, jitted[0], eager[0])
    assert update._cache_size() == 1


@rows
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_dtypes_and_trains_in_low_precision(row, dtype):
    make, rate, params, loss = _case(row)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx = make(rate)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(jax.grad(loss)(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    trained, _ = _train(tx, params, loss, 100)
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
def test_equals_one_device_on_eight(row, eight_devices):
    make, rate, params, _ = _case(row, "stacked")
    params = jax.tree.map(lambda p: jnp.concatenate([p] * 8)[:8], params)
    grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    tx = make(rate, stack_axes=(0,))
    mesh = jax.make_mesh((8,), ("fsdp",), devices=eight_devices, axis_types=(jax.sharding.AxisType.Auto,))

    def two_steps(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected = jax.jit(two_steps)(params, grads)
    # Split over the stack; and over the fan-in of A and the fan-out of B.
    for a, b in (((P("fsdp"),) * 2), (P(None, "fsdp"), P(None, None, "fsdp"))):
        specs = {"layers": {"lora_a": NamedSharding(mesh, a), "lora_b": NamedSharding(mesh, b)}}
        placed = jax.device_put((params, grads), (specs, specs))
        moved, state = jax.jit(two_steps, out_shardings=(specs, None))(*placed)
        chex.assert_trees_all_close(moved, expected[0], rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected[1])


@rows
def test_composes_with_multi_steps(row):
    make, rate, params, loss = _case(row)
    grads = jax.grad(loss)(params)
    tx = optax.MultiSteps(make(rate), every_k_schedule=2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates, state = update(grads, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(grads, state, params)
    plain = make(rate)
    _assert_close(row, updates, jax.jit(plain.update)(grads, plain.init(params), params)[0])


@rows
def test_takes_a_schedule_and_an_injected_rate(row):
    make, rate, params, loss = _case(row)
    schedule = optax.linear_schedule(rate, rate / 2, 4)
    scheduled, injected = make(schedule), optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(rate)
    states = scheduled.init(params), injected.init(params)
    updates_of = jax.jit(scheduled.update), jax.jit(injected.update)
    for step in range(3):
        grads = jax.grad(loss)(params)
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
    params, loss = PROBLEMS["asymmetric"]()
    tx = make()
    updates, _ = jax.jit(tx.update)(jax.grad(loss)(params), tx.init(params), params)
    chex.assert_tree_all_finite(updates)


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

    alone, plain = pairs_of(params), make(rate)
    expected, _ = jax.jit(plain.update)(pairs_of(grads), plain.init(alone), alone)
    for tx in (masked, partitioned):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        assert not updates["v"]["bias"].any()
        _assert_close(row, pairs_of(updates), expected)


@rows
def test_resumes_bitwise_from_a_checkpoint(row, tmp_path):
    make, rate, params, loss = _case(row)
    tx = make(rate)
    params, state = _train(tx, params, loss, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", (params, state))
    grads, update = jax.grad(loss)(params), jax.jit(tx.update)
    chex.assert_trees_all_equal(update(grads, restored[1], restored[0]), update(grads, state, params))


@rows
def test_vmaps_over_a_batch_of_adapters(row):
    make, rate, params, loss = _case(row)
    batch = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p, 2.0 * p]), params)

    def one(params, rate):
        tx = make(rate)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    rates = rate * jnp.array([1.0, 0.5, 2.0])
    together = jax.jit(jax.vmap(one))(batch, rates)
    for i in range(3):
        alone = jax.jit(one)(jax.tree.map(lambda p, i=i: p[i], batch), rates[i])
        _assert_close(row, jax.tree.map(lambda p, i=i: p[i], together), alone)


@rows
@pytest.mark.parametrize("layout", ["torch", "einsum", "stack axis 1"])
def test_a_pair_in_another_layout_moves_the_same(row, layout):
    make, rate, _, _ = _case(row)
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 12, 4)), rng.normal(size=(2, 4, 6))
    plain = {"lora_a": a, "lora_b": b}
    to, back = {
        "torch": (lambda x: jnp.swapaxes(x, -1, -2),) * 2,
        "einsum": (
            lambda x: x.reshape(2, 4, 2, 3) if x.shape == (2, 4, 6) else x,
            lambda x: x.reshape(2, 4, 6) if x.shape == (2, 4, 2, 3) else x,
        ),
        "stack axis 1": (lambda x: jnp.moveaxis(x, 0, 1), lambda x: jnp.moveaxis(x, 1, 0)),
    }[layout]
    plain = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), plain)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), plain)

    def three_steps(params, grads, stack_axes=(0,)):
        tx = make(rate, stack_axes=stack_axes)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    axes = (1,) if layout == "stack axis 1" else (0,)
    moved = jax.tree.map(
        back, jax.jit(three_steps, static_argnums=2)(jax.tree.map(to, plain), jax.tree.map(to, grads), axes)
    )
    _assert_close(row, moved, jax.jit(three_steps)(plain, grads))


@rows
def test_works_in_an_nnx_optimizer(row):
    make, rate, _, _ = _case(row)
    model = nnx.LoRA(9, 2, 5, rngs=nnx.Rngs(0))
    params = {"lora_a": model.lora_a[...], "lora_b": model.lora_b[...]}
    grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    optimizer, tx = nnx.Optimizer(model, make(rate), wrt=nnx.LoRAParam), make(rate)
    update, state = jax.jit(tx.update), tx.init(params)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.State({side: nnx.LoRAParam(grads[side]) for side in grads}))

    for _ in range(2):
        step(model, optimizer)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    _assert_close(row, {"lora_a": model.lora_a[...], "lora_b": model.lora_b[...]}, params)


@rows
def test_needs_params(row):
    make, rate, params, loss = _case(row)
    tx = make(rate)
    with pytest.raises(ValueError, match="params"):
        tx.update(jax.grad(loss)(params), tx.init(params))
