"""LoRA+, Riemannian and LoRA-RITE: float64 specifications, invariances, linear algebra, guards, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax import (
    lora_plus,
    lora_rite,
    lora_rite_report,
    riemannian_adamw,
    scale_by_lora_rite,
    scale_by_riemannian,
    stable_lora,
)
from stable_lora_jax.optim import linalg
from tests.optim.specifications import spec_lora_plus, spec_lora_rite, spec_riemannian

CASES = {
    "lora_plus": (lora_plus(1e-2, 4.0, weight_decay=0.1), spec_lora_plus, {}),
    "simultaneous": (
        riemannian_adamw(1e-2, reg=1e-3, eps=1e-6, weight_decay=0.1),
        spec_riemannian,
        {"ordering": "simultaneous"},
    ),
    "sequential": (
        riemannian_adamw(1e-2, ordering="sequential", reg=1e-3, eps=1e-6, weight_decay=0.1),
        spec_riemannian,
        {"ordering": "sequential"},
    ),
    "lora_rite": (
        lora_rite(1e-2, weight_decay=0.1, update_skipping=5.0, update_capping=0.5),
        spec_lora_rite,
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "r", "m"), [(24, 4, 10), (16, 8, 16), (5, 1, 9)])
def test_equals_the_float64_specification(case, n, r, m):
    tx, spec, options = CASES[case]
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, r)) / np.sqrt(n), rng.normal(size=(r, m)) / 10
    grads = [(rng.normal(size=(n, r)) / 9, rng.normal(size=(r, m)) / 9) for _ in range(20)]
    with jax.enable_x64(True):
        params = {"lora_a": jnp.array(a), "lora_b": jnp.array(b)}
        state, update = tx.init(params), jax.jit(tx.update)
        for (grad_a, grad_b), (a_spec, b_spec) in zip(grads, spec(a, b, grads, **options), strict=True):
            updates, state = update({"lora_a": jnp.asarray(grad_a), "lora_b": jnp.asarray(grad_b)}, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["lora_a"], a_spec, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(params["lora_b"], b_spec, rtol=1e-8, atol=1e-10)


def moved_product(tx, a, b, steps):
    """Returns A B after some steps on ||A B - target||²/2, from a given split."""
    target = jnp.asarray(np.random.default_rng(3).normal(size=(a.shape[0], b.shape[1])))
    params = {"lora_a": a, "lora_b": b}
    state, grad = tx.init(params), jax.grad(lambda p: jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2) / 2)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["lora_a"] @ params["lora_b"])


@pytest.mark.parametrize(
    ("tx", "steps", "invariant"),
    [
        (optax.chain(scale_by_riemannian(0.0), optax.sgd(0.1)), 5, True),
        (lora_rite(1e-2, update_skipping=0.0), 5, True),
        (lora_rite(1e-2, update_skipping=0.0, escape=True), 5, True),
        (optax.sgd(0.01), 5, False),
        (optax.adam(0.01), 5, False),
        (riemannian_adamw(1e-2), 5, False),
    ],
    ids=["riemannian sgd", "lora_rite", "lora_rite escape", "sgd", "adam", "riemannian adam"],
)
def test_the_product_moves_the_same_for_every_split(tx, steps, invariant):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(14, 4)), rng.normal(size=(4, 10))
    r = rng.normal(size=(4, 4)) + 2 * np.eye(4)
    with jax.enable_x64(True):
        first = moved_product(tx, jnp.asarray(a), jnp.asarray(b), steps)
        second = moved_product(tx, jnp.asarray(a @ np.linalg.inv(r)), jnp.asarray(r @ b), steps)
    off = np.linalg.norm(first - second) / np.linalg.norm(first - a @ b)
    assert off < 1e-9 if invariant else off > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4])
@pytest.mark.parametrize("r", [1, 8, 16, 40])
def test_columns_from_gram_matrices_are_orthonormal(dtype, condition, r):
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        u, v = (np.linalg.qr(rng.normal(size=(rows, r)))[0] for rows in (200, r))
        x = jnp.asarray(u * np.geomspace(1, 1 / condition, r) @ v.T, dtype)[None]
        (t,), (basis,) = linalg.orthonormalizers([jnp.swapaxes(x, 1, 2)])
        t, basis, x = (np.asarray(each[0], np.float64) for each in (t, basis, x))
    eps = float(jnp.finfo(dtype).eps)
    kept = np.linalg.norm(basis, axis=1) > 0
    assert kept.all() or condition > 1 / np.sqrt(8 * r * eps)
    assert np.linalg.norm(basis[kept] @ basis[kept].T - np.eye(kept.sum())) < 20 * r * eps
    assert np.linalg.norm(x @ t - basis.T) < 20 * r * eps * condition


@pytest.mark.parametrize("r", [1, 3, 8, 32, 40])
def test_inverse_of_a_batch(r):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 3 * r, r))
    grams = np.einsum("kni,knj->kij", x, x)
    grams[0] = 0
    with jax.enable_x64(True):
        ours = np.asarray(linalg.inverse(jnp.asarray(grams)))
    np.testing.assert_allclose(ours[1:] @ grams[1:], np.broadcast_to(np.eye(r), (5, r, r)), atol=1e-9)
    assert not ours[0].any()


@pytest.mark.parametrize("ordering", ["simultaneous", "sequential"])
def test_a_singular_gram_matrix_gives_no_nan(ordering):
    params = {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.zeros((3, 4))}
    tx = riemannian_adamw(1e-2, ordering=ordering, reg=0.0)
    state, update, grads = tx.init(params), jax.jit(tx.update), jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(jnp.isfinite(leaf).all() for leaf in params.values())
    assert params["lora_b"].any()


def test_rite_reports_pairs_of_several_kinds_by_name():
    # One pair's gradient is large enough to be skipped; kinds and names are in different orders in the tree.
    shapes = {"b": (12, 6), "a": (20, 6), "c": (12, 6)}
    rng = np.random.default_rng(8)
    params = {
        name: {"lora_a": jnp.asarray(rng.normal(size=(n, 3))), "lora_b": jnp.asarray(rng.normal(size=(3, m)))}
        for name, (n, m) in shapes.items()
    }
    grads = jax.tree.map(jnp.ones_like, params)
    grads["c"] = jax.tree.map(lambda g: 1e6 * g, grads["c"])
    tx = lora_rite(1e-3, update_skipping=100.0)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    report = lora_rite_report(params, state)
    skipped = {name: int(count[0]) for name, count in report.skipped_a.items()}
    assert skipped == {"a/lora": 0, "b/lora": 0, "c/lora": 1}


def test_the_state_follows_the_pairs_by_name():
    """A list of layers counts 2 before 10, a mapping of the same names 10 before 2."""
    rng = np.random.default_rng(0)
    listed = [{"lora_a": rng.normal(size=(6, 2)), "lora_b": rng.normal(size=(2, 4))} for _ in range(11)]

    def mapped(layers):
        return {str(number): layer for number, layer in enumerate(layers)}

    tx = scale_by_lora_rite()
    grads = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), listed) for _ in range(3)]
    params = jax.tree.map(jnp.asarray, listed)
    state = tx.init(params)
    for grad in grads[:2]:
        _, state = tx.update(grad, state, params)
    wanted, _ = tx.update(grads[2], state, params)
    found, _ = tx.update(mapped(grads[2]), state, mapped(params))
    for number, layer in enumerate(wanted):
        np.testing.assert_array_equal(found[str(number)]["lora_a"], layer["lora_a"])
        np.testing.assert_array_equal(found[str(number)]["lora_b"], layer["lora_b"])


def test_rite_counts_what_it_skips_and_how_much_it_clips():
    rng = np.random.default_rng(6)
    params = {"lora_a": jnp.asarray(rng.normal(size=(2, 12, 3))), "lora_b": jnp.asarray(rng.normal(size=(2, 3, 6)))}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads = jax.tree.map(lambda p: jnp.ones_like(p).at[1].mul(100.0), params)
    tx = optax.chain(optax.identity(), stable_lora(lora_rite(1e-3, update_skipping=5.0), 0.0))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
    report = jax.jit(lora_rite_report)(params, state)
    np.testing.assert_array_equal(report.skipped_a["lora"], [0, 3])
    np.testing.assert_array_equal(report.skipped_b["lora"], [0, 3])
    assert 0 < report.clip_factor < 1
    assert not updates["lora_a"][1].any()
    assert updates["lora_a"][0].any()


@pytest.mark.parametrize("value", [1e25, np.inf])
def test_a_skipped_factor_harms_nothing_however_large_its_gradient(value):
    rng = np.random.default_rng(6)
    params = {"lora_a": jnp.asarray(rng.normal(size=(2, 12, 3))), "lora_b": jnp.asarray(rng.normal(size=(2, 3, 6)))}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    tx = lora_rite(1e-3)
    state, update = tx.init(params), jax.jit(tx.update)
    for large in (True, False):
        given = grads | {"lora_a": grads["lora_a"].at[1, 0, 0].set(value)} if large else grads
        updates, state = update(given, state, params)
        assert updates["lora_a"][1].any() != large
        params = optax.apply_updates(params, updates)
        assert all(jnp.isfinite(leaf).all() for leaf in params.values())
    np.testing.assert_array_equal(lora_rite_report(params, state).skipped_a["lora"], [0, 1])


def test_a_gradient_that_is_nan_is_not_skipped_in_silence():
    params = {"lora_a": jnp.ones((2, 12, 3)), "lora_b": jnp.ones((2, 3, 6))}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    tx = lora_rite(1e-3)
    given = grads | {"lora_a": grads["lora_a"].at[1, 0, 0].set(np.nan)}
    updates, state = jax.jit(tx.update)(given, tx.init(params), params)
    nan = jnp.isnan(updates["lora_a"])
    assert nan[1].any()
    assert not nan[0].any()
    assert not jnp.isnan(updates["lora_b"]).any()
    np.testing.assert_array_equal(lora_rite_report(params, state).skipped_a["lora"], [0, 0])


def test_rite_trains_where_the_batch_is_smaller_than_the_rank():
    rng = np.random.default_rng(7)
    x, y = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 16), (2, 8)))
    params = {"lora_a": jnp.asarray(rng.normal(size=(16, 8)) / 4, jnp.float32), "lora_b": jnp.zeros((8, 8))}

    def loss(p):
        return jnp.mean((x @ p["lora_a"] @ p["lora_b"] - y) ** 2)

    tx = lora_rite(1e-2, update_skipping=0.0)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, tx.init(params)
    for _ in range(200):
        trained, state = step(trained, state)
    assert loss(trained) < 0.05 * loss(params)


def test_max_step_a_guards_the_second_step():
    rng = np.random.default_rng(8)
    params = {"lora_a": jnp.asarray(rng.normal(size=(64, 4)) / 8, jnp.float32), "lora_b": jnp.zeros((4, 64))}

    grads = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(9).normal(size=p.shape) / 99), params)
    first = grads | {"lora_a": jnp.zeros((64, 4))}  # as B = 0 makes it
    both = jax.tree.map(lambda *g: jnp.stack(g), first, grads)

    @functools.partial(jax.jit, static_argnames="max_step_a")
    def two_steps(rate, max_step_a):
        tx = lora_rite(rate, update_skipping=0.0, max_step_a=max_step_a)

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            moved = optax.apply_updates(params, updates)
            return (moved, state), moved["lora_a"]

        return jax.lax.scan(step, (params, tx.init(params)), both)[1]

    def second_step(rate, max_step_a=None):
        before, after = np.asarray(two_steps(rate, max_step_a))
        return np.linalg.norm(after - before) / np.linalg.norm(before)

    for rate in (1e-4, 1e-2):  # as in the reference, whatever the learning rate is
        assert second_step(rate) > 0.4
        assert second_step(rate, max_step_a=0.05) < 0.0501


def test_balance_ends_at_equal_norms_and_keeps_the_product():
    rng = np.random.default_rng(10)
    params = {"lora_a": jnp.asarray(rng.normal(size=(12, 3))), "lora_b": jnp.asarray(rng.normal(size=(3, 6)) / 50)}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    grads = jax.tree.map(jnp.ones_like, params)
    results = []
    for balance in (False, True):
        tx = lora_rite(1e-3, balance=balance)
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        results.append(optax.apply_updates(params, updates))
    plain, balanced = results
    np.testing.assert_allclose(*(jnp.linalg.norm(balanced[side]) for side in ("lora_a", "lora_b")), rtol=1e-4)
    product = [each["lora_a"] @ each["lora_b"] for each in (plain, balanced)]
    np.testing.assert_allclose(product[1], product[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora_plus(1e-3, -4.0), "ratio=-4.0 is not in [0, inf). It is the learning rate of B over that of A"),
        (lambda: lora_plus(1e-3, float("nan")), "ratio=nan is not in [0, inf)"),
        (lambda: lora_plus(1e-3, 4.0, b1=1.0), "b1=1.0 is not in [0, 1). It is the decay rate of a moment"),
        (lambda: riemannian_adamw(1e-3, eps=-1.0), "eps=-1.0 is not in [0, inf). It keeps a division"),
        (lambda: scale_by_riemannian(-1.0), "reg=-1.0 is not in [0, inf). reg is added to the diagonal"),
        (lambda: riemannian_adamw(1e-3, reg=float("inf")), "reg=inf is not in [0, inf)"),
        (
            lambda: riemannian_adamw(1e-3, ordering="both"),
            "ordering='both' is unknown. Known orderings: simultaneous, sequential.",
        ),
        (lambda: scale_by_lora_rite(b1=1.0), "b1=1.0 is not in [0, 1). It is the decay rate of a moment"),
        (lambda: lora_rite(1e-3, clip=-1.0), "clip=-1.0 is not in [0, inf). 0 switches it off."),
        (lambda: lora_rite(1e-3, max_step_a=-1.0), "max_step_a=-1.0 is not in [0, inf)"),
        (
            lambda: lora_rite_report({}, optax.adamw(1e-3).init({"lora_a": jnp.ones((4, 2))})),
            "holds 0 LoraRiteState instead of one",
        ),
        (
            lambda: lora_rite_report(
                {"lora_a": jnp.ones((2, 8, 4)), "lora_b": jnp.ones((2, 4, 6))},
                lora_rite(1e-3).init({"lora_a": jnp.ones((8, 4)), "lora_b": jnp.ones((4, 6))}),
            ),
            "opt_state belongs to other parameters: it counts [1] matrices of each kind, params hold [2].",
        ),
        *(
            (
                lambda tx=tx: tx.init({"lora_A": jnp.ones((4, 4)), "lora_B": jnp.ones((4, 4))}),
                "The rank axis of the pair 'lora' is unknown: A (4, 4) and B (4, 4) can be read as (n, r)/(r, m)",
            )
            for tx in (lora_rite(1e-3), scale_by_riemannian(), riemannian_adamw(1e-3))
        ),
        (
            lambda: optax.inject_hyperparams(lora_rite)(1e-3).init(
                {"lora_a": jnp.ones((4, 2), jnp.bfloat16), "lora_b": jnp.ones((2, 4), jnp.bfloat16)}
            ),
            "b2=1.0 is not in [0, 1). It is the decay rate of a moment, e.g. 0.9 or 0.999. If optax.inject_hyperparams",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
