"""The transformation against a float64 specification, its invariants, and Optax's conventions."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from stable_lora_jax import (
    PairStability,
    StableLoraState,
    lora_rite,
    stability,
    stable_lora,
    stable_lora_shrink,
)

LAM = 0.02


def pair(rng, n=24, r=4, m=12, stack=(), b_scale=0.0, dtype=jnp.float32):
    a = rng.normal(size=(*stack, n, r)) / np.sqrt(n)
    b = b_scale * rng.normal(size=(*stack, r, m))
    return {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)}


def tree(seed=0, dtype=jnp.float32):
    """Adapters of two shapes, one of them stacked, among frozen weights and a bias."""
    rng = np.random.default_rng(seed)
    return {
        "q": pair(rng, dtype=dtype) | {"kernel": jnp.ones((24, 12), dtype)},
        "layers": {"v": pair(rng, 10, 2, 8, stack=(3,), dtype=dtype), "bias": jnp.ones((3, 8), dtype)},
    }


def gradients(seed, like):
    """Noise around a constant, so that B grows steadily as it does in training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(1.0 + rng.normal(size=p.shape), p.dtype), like)


def run(tx, params, steps, seed=100):
    """Returns the parameters and state after some steps with random gradients."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(seed + step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def specification(a, b, grads, lam, lr, decay, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 1 with AdamW on one pair, float64; yields A, B and the flag after every step."""
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    (n, _), (_, m) = a.shape, b.shape
    moments, stable = [[np.zeros_like(a), np.zeros_like(a)], [np.zeros_like(b), np.zeros_like(b)]], False
    for t, (grad_a, grad_b) in enumerate(grads, start=1):
        stable = stable or np.linalg.norm(a) / n < np.linalg.norm(b) / m
        a = a if stable else (1 - lam) * a
        for matrix, grad, (mu, nu) in zip((a, b), (np.float64(grad_a), np.float64(grad_b)), moments, strict=True):
            matrix *= 1 - lr * decay
            mu[:] = b1 * mu + (1 - b1) * grad
            nu[:] = b2 * nu + (1 - b2) * grad**2
            matrix -= lr * (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)
        yield a.copy(), b.copy(), stable


@pytest.mark.parametrize("form", ["wrapper", "chain"])
def test_equals_the_float64_specification(form):
    # Without decay the two forms are the same algorithm; with it the chain is only close (see the module).
    decay = 0.1 if form == "wrapper" else 0.0
    adamw = optax.adamw(2e-2, weight_decay=decay)
    tx = stable_lora(adamw, LAM) if form == "wrapper" else optax.chain(adamw, stable_lora_shrink(LAM))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), tree())
        grads = [gradients(step, params) for step in range(60)]
        state, update = tx.init(params), jax.jit(tx.update)
        history, flags = [], []
        for grad in grads:
            updates, state = update(grad, state, params)
            params = optax.apply_updates(params, updates)
            history.append(params)
            flags.append({name: s.stable for name, s in stability(params, state).items()})
    stops = []
    for get, name, index in [
        (lambda p: p["q"], "q/lora", ()),
        *[(lambda p, i=i: jax.tree.map(lambda x: x[i], p["layers"]["v"]), "layers/v/lora", (i,)) for i in range(3)],
    ]:
        start, fed = get(tree()), [(get(g)["lora_a"], get(g)["lora_b"]) for g in grads]
        spec = list(specification(start["lora_a"], start["lora_b"], fed, LAM, 2e-2, decay))
        for (a, b, stable), ours, flag in zip(spec, history, flags, strict=True):
            np.testing.assert_allclose(get(ours)["lora_a"], a, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(get(ours)["lora_b"], b, rtol=1e-9, atol=1e-12)
            assert flag[name][index] == stable
        stops.append(sum(not stable for _, _, stable in spec))
    assert all(0 < stop < 60 for stop in stops), stops
    assert len(set(stops)) > 2  # the matrices of a stack stop one by one


@pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.sgd(0.1, momentum=0.9), optax.lion(1e-3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lambda_zero_is_bitwise_the_inner_optimizer(inner, dtype):
    expected, _ = run(inner, tree(dtype=dtype), 5)
    for tx in (stable_lora(inner, 0.0), optax.chain(inner, stable_lora_shrink(0.0))):
        chex.assert_trees_all_equal(run(tx, tree(dtype=dtype), 5)[0], expected)


def test_the_flag_closes_once_and_for_good():
    params = {"lora_a": jnp.ones((16, 4)), "lora_b": jnp.ones((4, 16))}
    tx = stable_lora_shrink(LAM)
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    updates, state = tx.update(zero, state, params)  # a tie: the authors' strict test shrinks
    assert not state.stable["lora"]
    assert jnp.all(updates["lora_a"] == -params["lora_a"] * (1 - jnp.float32(1 - LAM)))
    updates, state = tx.update(zero, state, params | {"lora_b": 1.01 * params["lora_b"]})
    assert state.stable["lora"]
    assert jnp.all(updates["lora_a"] == 0)
    updates, state = tx.update(zero, state, params | {"lora_b": 0 * params["lora_b"]})  # unstable again: stays shut
    assert state.stable["lora"]
    assert jnp.all(updates["lora_a"] == 0)


def test_without_the_stop_rule_a_keeps_shrinking():
    params = {"lora_a": jnp.ones((16, 4)), "lora_b": 2 * jnp.ones((4, 16))}
    tx = stable_lora_shrink(LAM, stop_when_stable=False)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert state.stable["lora"]
    np.testing.assert_allclose(updates["lora_a"], -LAM, rtol=1e-5)


def test_lambda_may_follow_a_schedule():
    params = {"lora_a": jnp.ones((16, 4)), "lora_b": jnp.zeros((4, 16))}
    tx = stable_lora_shrink(optax.linear_schedule(0.0, 0.1, 10))
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for step in range(5):
        updates, state = jax.jit(tx.update)(zero, state, params)
        np.testing.assert_allclose(updates["lora_a"], -0.01 * step, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("lam", [0.0005, 0.001, 0.002, 0.005])
@pytest.mark.parametrize("form", ["wrapper", "chain"])
def test_the_shrink_acts_in_low_precision(dtype, lam, form):
    rng = np.random.default_rng(0)
    params = {"one": pair(rng, 256, 8, 64, dtype=dtype), "stack": pair(rng, 64, 4, 64, stack=(5,), dtype=dtype)}
    tx = stable_lora(optax.sgd(1.0), lam) if form == "wrapper" else optax.chain(optax.sgd(1.0), stable_lora_shrink(lam))
    state, start = tx.init(params), stability(params, tx.init(params))
    assert not any(leaf.ndim > 1 for leaf in jax.tree.leaves(state))  # nothing of A's size

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), length=200)
    for name, now in stability(params, state).items():
        wanted = start[name].norm_a * (1 - lam) ** 200
        np.testing.assert_allclose(now.norm_a, wanted, rtol=0.01)
        stored = params[name.split("/")[0]]["lora_a"].astype(jnp.float32)
        np.testing.assert_allclose(jnp.linalg.norm(stored, axis=(-2, -1)), wanted, rtol=0.06)


def test_what_is_pending_is_applied_when_a_pair_becomes_stable():
    params = {"lora_a": jnp.ones((16, 4), jnp.bfloat16), "lora_b": jnp.zeros((4, 16), jnp.bfloat16)}
    tx = stable_lora_shrink(0.01)
    state = tx.init(params)
    for b in (0.0, 0.0, 2.0):
        params["lora_b"] = jnp.full((4, 16), b, jnp.bfloat16)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert state.pending["lora"] == 1
    np.testing.assert_allclose(params["lora_a"].astype(jnp.float32), 0.99**2, rtol=2**-8)


class TestConventions:
    def test_jit_equals_eager_without_recompiling_and_keeps_dtypes_in_bfloat16(self):
        dtype = jnp.bfloat16
        tx = stable_lora(optax.adamw(1e-2), LAM)
        params = eager = tree(dtype=dtype)
        chex.clear_trace_counter()
        traced = chex.assert_max_traces(lambda *args: tx.update(*args), n=1)
        update, state, eager_state = jax.jit(traced), tx.init(params), tx.init(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
        for step in range(3):
            grads = gradients(step, params)
            updates, new_state = update(grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            params, state = optax.apply_updates(params, updates), new_state
            updates, eager_state = tx.update(grads, eager_state, eager)
            eager = optax.apply_updates(eager, updates)
        # Some units in the last place: fused and unfused multiply-adds round differently.
        eps = float(jnp.finfo(dtype).eps)
        chex.assert_trees_all_close(params, eager, rtol=4 * eps, atol=eps)

    def test_scan_donation_and_extra_arguments(self):
        tx = optax.chain(optax.adamw(1e-2), stable_lora_shrink(LAM))
        expected, _ = run(tx, tree(), 4)
        stacked = jax.tree.map(lambda *g: jnp.stack(g), *[gradients(100 + step, tree()) for step in range(4)])

        @jax.jit
        def body(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params, value=1.0, anything="goes")
            return (optax.apply_updates(params, updates), state), None

        start = (tree(), tx.init(tree()))
        (params, _), _ = jax.jit(lambda s: jax.lax.scan(body, s, stacked), donate_argnums=0)(start)
        assert start[0]["q"]["lora_a"].is_deleted()
        chex.assert_trees_all_close(params, expected, rtol=1e-5)

    def test_vmap_over_adapters_equals_one_by_one(self):
        params = [tree(seed) for seed in range(3)]
        params[1]["q"]["lora_b"] += 3.0  # stable from the start, beside two that are not
        tx = stable_lora_shrink(LAM)
        batch = jax.tree.map(lambda *p: jnp.stack(p), *params)
        updates, state = jax.vmap(tx.update)(batch, jax.vmap(tx.init)(batch), batch)
        for i, single in enumerate(params):
            expected = tx.update(single, tx.init(single), single)
            chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], (updates, state)), expected, rtol=1e-6)
        assert state.stable["q/lora"].tolist() == [False, True, False]

    def test_multi_steps_shrinks_once_per_real_step(self):
        params = {"lora_a": jnp.ones((16, 4)), "lora_b": jnp.zeros((4, 16))}
        tx = optax.MultiSteps(optax.chain(optax.sgd(0.0), stable_lora_shrink(LAM)), every_k_schedule=3)
        state = tx.init(params)
        for _ in range(6):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["lora_a"], (1 - LAM) ** 2, rtol=1e-6)
        assert set(stability(params, state)) == {"lora"}

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_inject_hyperparams(self, dtype):
        # Optax casts λ to the parameters' dtype: in bfloat16, 1 - λ would then be 1.
        params = {"lora_a": jnp.ones((16, 4), dtype), "lora_b": jnp.zeros((4, 16), dtype)}
        tx = optax.inject_hyperparams(stable_lora_shrink)(lam=0.0005)
        state = tx.init(params)
        for _ in range(20):
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
            params = optax.apply_updates(params, updates)
        assert stability(params, state)["lora"].norm_a / 8 == pytest.approx(0.9995**20, rel=1e-4)
        state.hyperparams["lam"] = jnp.asarray(0.5, dtype)
        updates, _ = jax.jit(tx.update)(updates, state, params)
        assert jnp.all(updates["lora_a"] < -0.45)

    def test_masked_and_partitioned(self):
        params = tree()
        masked = optax.masked(
            stable_lora_shrink(LAM), {"q": {"lora_a": True, "lora_b": True, "kernel": False}, "layers": False}
        )
        groups = {"q": "fast", "layers": {"v": "slow", "bias": "frozen"}}
        groups["q"] = {"lora_a": "fast", "lora_b": "fast", "kernel": "frozen"}
        partitioned = optax.partition(
            {
                "fast": stable_lora(optax.sgd(0.0), 0.5),
                "slow": stable_lora(optax.sgd(0.0), LAM),
                "frozen": optax.set_to_zero(),
            },
            groups,
        )
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, state = masked.update(zero, masked.init(params), params)
        assert set(stability(params, state)) == {"q/lora"}
        assert jnp.any(updates["q"]["lora_a"] != 0)
        assert not jnp.any(updates["layers"]["v"]["lora_a"])
        updates, state = partitioned.update(zero, partitioned.init(params), params)
        assert set(stability(params, state)) == {"q/lora", "layers/v/lora"}
        np.testing.assert_allclose(updates["q"]["lora_a"], -0.5 * params["q"]["lora_a"], rtol=1e-6)
        np.testing.assert_allclose(updates["layers"]["v"]["lora_a"], -LAM * params["layers"]["v"]["lora_a"], rtol=1e-5)

    def test_sharded_over_eight_devices(self, eight_devices):
        mesh = jax.sharding.Mesh(np.reshape(eight_devices, (2, 4)), ("fsdp", "tensor"))
        spec = jax.sharding.PartitionSpec
        shardings = {
            "lora_a": jax.NamedSharding(mesh, spec(None, "fsdp", None)),
            "lora_b": jax.NamedSharding(mesh, spec(None, None, "tensor")),
        }
        params = pair(np.random.default_rng(0), stack=(3,), b_scale=0.05)
        tx = stable_lora(optax.adamw(2e-2), LAM)
        expected, expected_state = run(tx, params, 12)
        sharded, state = run(tx, jax.device_put(params, shardings), 12)
        assert sharded["lora_a"].sharding.is_equivalent_to(shardings["lora_a"], 3)
        chex.assert_trees_all_close(sharded, expected, rtol=1e-5)
        chex.assert_trees_all_equal(state[0].stable, expected_state[0].stable)
        assert expected_state[0].stable["lora"].any()

    def test_the_state_survives_a_checkpoint(self, tmp_path):
        tx = optax.chain(optax.adamw(1e-2), stable_lora_shrink(LAM))
        params, state = run(tx, tree(dtype=jnp.bfloat16), 25)
        assert any(jnp.any(flag) for flag in state[1].stable.values())
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
        chex.assert_trees_all_equal(restored, state)
        assert isinstance(restored[1], StableLoraState)

    def test_nnx_optimizer(self):
        model = nnx.LoRALinear(16, 8, lora_rank=4, rngs=nnx.Rngs(0))
        tx = optax.chain(optax.adamw(1e-3), stable_lora_shrink(LAM))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
        before = jnp.linalg.norm(model.lora.lora_a[...])

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 16))) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(
                model
            )
            optimizer.update(model, grads)
            return stability(nnx.state(model, nnx.LoRAParam), optimizer.opt_state)

        for _ in range(3):
            report = step(model, optimizer)
        assert set(report) == {"lora/lora"}
        assert isinstance(report["lora/lora"], PairStability)
        np.testing.assert_allclose(report["lora/lora"].norm_a, before * (1 - LAM) ** 3, rtol=0.05)
        chex.assert_trees_all_close(stability(model, optimizer.opt_state), report, rtol=1e-6)


@pytest.mark.parametrize("lam", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [stable_lora_shrink, lambda lam: stable_lora(optax.sgd(1.0), lam)])
def test_lambda_outside_its_range_is_refused(lam, make):
    with pytest.raises(ValueError, match=re.escape(f"lam={lam} is not in [0, 1)")):
        make(lam)


@pytest.mark.parametrize("tx", [stable_lora_shrink(0.1), stable_lora(optax.adamw(1.0), 0.1)])
def test_update_without_params_is_refused(tx):
    params = tree()
    with pytest.raises(ValueError, match=r"params=None.*tx.update\(grads, opt_state, params\)"):
        tx.update(params, tx.init(params))


def test_schedule_free_averaging_goes_around():
    params = pair(np.random.default_rng(0))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def norm_after(tx, iterate):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(zeros, state, params)
            return optax.apply_updates(params, updates), state

        after, state = jax.lax.fori_loop(0, 200, step, (params, tx.init(params)))
        return jnp.linalg.norm(iterate(after, state)["lora_a"]) / jnp.linalg.norm(params["lora_a"])

    free, inner = optax.contrib.schedule_free, optax.sgd(1e-3)
    around = norm_after(free(stable_lora(inner, 0.01), 1e-3), lambda params, state: state.z)
    within = norm_after(stable_lora(free(inner, 1e-3), 0.01), lambda params, state: params)
    np.testing.assert_allclose([around, within], [0.15, 0.43], atol=0.01)
    np.testing.assert_allclose(0.99**200, 0.13, atol=0.01)


def test_a_state_saved_as_pure_arrays_is_restored(tmp_path):
    def fresh():
        model = nnx.List([nnx.LoRALinear(16, 8, lora_rank=4, rngs=nnx.Rngs(i)) for i in range(2)])
        return nnx.Optimizer(model, stable_lora(lora_rite(1e-3), 0.01), wrt=nnx.LoRAParam), model

    optimizer, model = fresh()
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.as_pure(nnx.state(optimizer)))
        checkpointer.wait_until_finished()
        other, _ = fresh()
        nnx.update(other, checkpointer.restore(tmp_path / "state", nnx.as_pure(nnx.state(other))))
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(other)), nnx.as_pure(nnx.state(optimizer)))
