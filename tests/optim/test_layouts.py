"""Layouts that libraries give their adapters: each is read as one NumPy product of matrices, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax import PairSpec, find_pairs, lora_plus, lora_rite, riemannian_adamw, stability, stable_lora_shrink
from tests.optim.specifications import spec_lora_plus, spec_lora_rite, spec_riemannian

FLAX, KERAS, PEFT, EXPERTS = (
    ("kernel_lora_a", "kernel_lora_b"),
    ("lora_kernel_a", "lora_kernel_b"),
    ("lora_A.weight", "lora_B.weight"),
    ("w_lora_a", "w_lora_b"),
)


def rows_first(a, b):
    """Flax: the rank is A's last axis, and B's one before the fan-out."""
    r = a.shape[-1]
    return [(a.reshape(-1, r), b.reshape(r, -1))]


def rank_first(a, b):
    """Torch: the rank is A's first axis, and B's second."""
    return [(a.reshape(a.shape[0], -1).T, b.reshape(b.shape[0], -1).T)]


def two_groups(a, b):
    """Torch, a convolution in two groups: each reads its half of the ranks and writes its half of the outputs."""
    (r, m), halves = (a.shape[0], b.shape[0]), range(2)
    a, b = a.reshape(2, r // 2, -1), b.reshape(2, m // 2, r // 2)
    return [(a[i].T, b[i].T) for i in halves]


# names, shapes of A and B, what `find_pairs` is told, the products, n, m
LAYOUTS = {
    "Flax, convolution": (FLAX, (3, 3, 8, 4), (4, 3), {}, rows_first, 72, 3),
    "Keras, convolution": (KERAS, (3, 3, 8, 4), (4, 3), {}, rows_first, 72, 3),
    "Flax, pointwise": (FLAX, (1, 1, 3, 4), (4, 1), {}, rows_first, 3, 1),
    "Keras, pointwise": (KERAS, (1, 1, 3, 4), (4, 1), {}, rows_first, 3, 1),
    "Flax, B a convolution": (FLAX, (3, 16, 4), (1, 4, 3), {}, rows_first, 48, 3),
    "PEFT, Conv2d": (PEFT, (4, 16, 3, 3), (8, 4, 1, 1), {}, rank_first, 144, 8),
    "PEFT, Conv2d to 1": (PEFT, (4, 16, 3, 3), (1, 4, 1, 1), {}, rank_first, 144, 1),
    "PEFT, Conv2d to 3": (PEFT, (4, 16, 3, 3), (3, 4, 1, 1), {}, rank_first, 144, 3),
    "PEFT, Conv1d": (PEFT, (4, 16, 3), (8, 4, 1), {}, rank_first, 48, 8),
    "PEFT, Conv1d to 1": (PEFT, (4, 16, 3), (1, 4, 1), {}, rank_first, 48, 1),
    "PEFT, Conv1d to 3": (PEFT, (4, 16, 3), (3, 4, 1), {}, rank_first, 48, 3),
    "PEFT, pointwise": (PEFT, (4, 16, 1, 1), (8, 4, 1, 1), {}, rank_first, 16, 8),
    "PEFT, rank 1": (PEFT, (1, 16, 3, 3), (8, 1, 1, 1), {}, rank_first, 144, 8),
    "PEFT, rank above both": (PEFT, (6, 4), (3, 6), {}, rank_first, 4, 3),
    "Qwix, experts": (EXPERTS, (5, 12, 4), (4, 6), {"stack_axes": lambda name: (0,)}, rows_first, 12, 6),
    "Qwix, attention output": (EXPERTS, (5, 12, 4), (4, 6), {"stack_axes": ()}, rows_first, 60, 6),
    "PEFT, grouped": (PEFT, (4, 16, 3, 3), (8, 2, 1, 1), {}, two_groups, 144, 4),
    "PEFT, grouped Conv1d": (PEFT, (4, 16, 3), (6, 2, 1), {}, two_groups, 48, 3),
}  # fmt: skip
OPTIMIZERS = {
    "lora_plus": (lambda **o: lora_plus(1e-2, 4.0, weight_decay=0.1, **o), spec_lora_plus, {}),
    "simultaneous": (
        lambda **o: riemannian_adamw(1e-2, reg=1e-3, eps=1e-6, weight_decay=0.1, **o),
        spec_riemannian, {"ordering": "simultaneous"},
    ),
    "sequential": (
        lambda **o: riemannian_adamw(1e-2, ordering="sequential", reg=1e-3, eps=1e-6, weight_decay=0.1, **o),
        spec_riemannian, {"ordering": "sequential"},
    ),
    "lora_rite": (
        lambda **o: lora_rite(1e-2, weight_decay=0.1, clip=0, update_skipping=5.0, update_capping=0.5, **o),
        spec_lora_rite, {"clip": np.inf},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fan_in_and_fan_out(layout):
    names, a, b, options, _, n, m = LAYOUTS[layout]
    (pair,) = find_pairs({names[0]: jnp.ones(a), names[1]: jnp.ones(b)}, **options)
    assert pair.fan_ratio == pytest.approx(n / m)
    assert pair.rank_axes is not None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves_as_the_specification_does_on_matrices(layout, optimizer):
    names, a, b, options, products, *_ = LAYOUTS[layout]
    make, spec, arguments = OPTIMIZERS[optimizer]
    rng = np.random.default_rng(0)
    tx = make(**options)
    start = rng.normal(size=a), rng.normal(size=b) / 10
    grads = [(rng.normal(size=a) / 9, rng.normal(size=b) / 9) for _ in range(3)]
    each = zip(products(*start), zip(*(products(*pair) for pair in grads), strict=True), strict=True)
    expected = [list(spec(x.copy(), y.copy(), list(of_one), **arguments))[-1] for (x, y), of_one in each]
    with jax.enable_x64(True):
        params = dict(zip(names, map(jnp.asarray, start), strict=True))
        state, update = tx.init(params), jax.jit(tx.update)
        for pair in grads:
            updates, state = update(dict(zip(names, map(jnp.asarray, pair), strict=True)), state, params)
            params = optax.apply_updates(params, updates)
        for ours, theirs in zip(products(*(np.asarray(params[name]) for name in names)), expected, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10)


def test_matrices_that_share_a_b_have_a_flag_each():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 12, 4)), rng.normal(size=(4, 6))
    a *= (1e-2 * np.arange(1, 300, 60))[:, None, None]
    params = {"w_lora_a": jnp.asarray(a, jnp.float32), "w_lora_b": jnp.asarray(b, jnp.float32)}
    tx = stable_lora_shrink(0.1, stack_axes=lambda name: (0,))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    expected = np.linalg.norm(a, axis=(1, 2)) / 12 < np.linalg.norm(b) / 6
    assert expected.any()
    assert not expected.all()
    np.testing.assert_array_equal(state.stable["w_lora"], expected)
    np.testing.assert_allclose(updates["w_lora_a"], np.where(expected[:, None, None], 0, -0.1 * a), rtol=1e-5)
    gap = stability(params, state, stack_axes=lambda name: (0,))["w_lora"].gap
    np.testing.assert_allclose(gap, np.linalg.norm(a, axis=(1, 2)) / 12 / (np.linalg.norm(b) / 6), rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "a", "b", "message"),
    [
        (("lora_a", "lora_b"), (16, 4), (8, 16), r"ranks of the pair 'lora' disagree: A has shape \(16, 4\)"),
        (("lora_A", "lora_B"), (16, 4), (8, 16), r"ranks of the pair 'lora' disagree"),
        (("lora_a", "lora_b"), (16, 4), (3, 4, 16), r"ranks of the pair 'lora' disagree"),  # one A, three B
        (("lora_a", "lora_b"), (16, 4), (5, 4, 16), r"ranks of the pair 'lora' disagree"),
        (("lora_A", "lora_B"), (16, 4), (5, 4, 16), r"ranks of the pair 'lora' disagree"),
        (PEFT, (4, 16, 3, 3), (9, 2, 1, 1), r"ranks of the pair 'lora.weight' disagree"),  # 9 outputs in 2 groups
        (EXPERTS, (5, 12, 4), (4, 6), r"sums over the axes \(0, 1\).*fan-in 60.*5 matrices A of fan-in 12.*Say stack"),
        (EXPERTS, (2, 5, 12, 4), (2, 4, 6), r"sums over the axes \(1, 2\).*returns \(0, 1\) for experts, else \(0,\)"),
        (FLAX, (5, 12, 4), (4, 6), r"or a convolution does"),
    ],
)  # fmt: skip
def test_what_shapes_and_names_leave_open_is_refused(names, a, b, message):
    with pytest.raises(ValueError, match=message):
        find_pairs({names[0]: jnp.ones(a), names[1]: jnp.ones(b)})


def test_a_rank_that_is_not_low_is_doubted_where_the_other_orientation_would_be():
    (pair,) = find_pairs({"lora_a": jnp.ones((4, 16)), "lora_b": jnp.ones((16, 4))})  # torch's, as torchtune calls them
    assert (pair.fan_ratio, pair.rank_axes) == (1.0, None)
    with pytest.raises(ValueError, match=r"rank axis of the pair 'lora' is unknown: A \(4, 16\)"):
        lora_rite(1e-3).init({"lora_a": jnp.ones((4, 16)), "lora_b": jnp.ones((16, 4))})
    (pair,) = find_pairs({"lora_a.weight": jnp.ones((4, 16)), "lora_b.weight": jnp.ones((16, 4))})
    assert pair.rank_axes == (0, 1)
    (pair,) = find_pairs(
        {"lora_A": jnp.ones((8, 2048, 32)), "lora_B": jnp.ones((8, 32, 2048))}
    )  # SkyRL: eight adapters
    assert (pair.stack_axes, pair.rank_axes) == ((0,), (2, 1))


FLAT = [jnp.ones(shape) for shape in ((16, 16), (16, 4), (4, 16), (8, 8), (5, 8, 2), (2, 8))]


def test_pairs_are_said_by_hand():
    specs = [PairSpec("1", "2"), PairSpec("4", "5", stack_axes=(0,), rank_axes=(-1, 0))]
    first, second = find_pairs(FLAT, labels=specs)
    assert (first.a, first.b, first.rank_axes, first.fan_ratio) == (1, 2, (1, 0), 1.0)
    assert (second.a, second.b, second.stack_axes, second.stack_axes_b) == (4, 5, (0,), ())
    assert second.fan_ratio == 1.0
    tx = stable_lora_shrink(0.5, labels=specs)
    updates, state = tx.update([jnp.zeros_like(x) for x in FLAT], tx.init(FLAT), FLAT)
    assert [float(u.flat[0]) for u in map(np.asarray, updates)] == [0, -0.5, 0, 0, -0.5, 0]
    assert {name: flag.shape for name, flag in state.stable.items()} == {"1": (), "4": (5,)}
    # Shared by three, in HydraLoRA's way: the fan-out of the one A is that of all B together.
    (pair,) = find_pairs([jnp.ones((16, 4)), jnp.ones((3, 4, 16))], labels=[PairSpec("0", "1", rank_axes=(1, 1))])
    assert pair.fan_ratio == 16 / 48


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([PairSpec("1", "7")], r"PairSpec names \['7'\], which params lack. The parameters are \['0', '1'"),
        ([PairSpec("1", "2"), PairSpec("1", "5")], r"PairSpec names \['1'\] more than once"),
        ([PairSpec("1", "5")], r"ranks of the pair '1' disagree"),
        ([PairSpec("1", "2", rank_axes=(0, 0))], r"PairSpec does not fit the pair '1' with A \(16, 4\) and B \(4,"),
        ([PairSpec("1", "2", rank_axes=(3, 0))], r"PairSpec does not fit the pair '1'"),
        ([PairSpec("4", "5", stack_axes=(2,), rank_axes=(2, 0))], r"PairSpec does not fit the pair '4'"),
        ([PairSpec("4", "5", stack_axes=(2,))], r"stack_axes=\(2,\) does not fit the pair '4' with A \(5, 8, 2\)"),
    ],
)  # fmt: skip
def test_a_specification_that_does_not_fit_is_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        find_pairs(FLAT, labels=specs)
