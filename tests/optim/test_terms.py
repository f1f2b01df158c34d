"""The terms of a step against products written out in NumPy."""

import jax
import numpy as np
import pytest

from stable_lora_jax.optim import update_terms


@pytest.mark.parametrize(
    ("shapes", "matrices"),
    [
        (((10, 3), (3, 7)), lambda a, b: [(a, b)]),
        (((3, 10), (7, 3)), lambda a, b: [(a.T, b.T)]),
        (((4, 10, 3), (4, 3, 7)), lambda a, b: list(zip(a, b, strict=True))),
        (((10, 3), (3, 2, 5)), lambda a, b: [(a, b.reshape(3, 10))]),
    ],
    ids=["plain", "torch", "stacked", "einsum"],
)
def test_terms_are_the_norms_of_the_products(shapes, matrices):
    rng = np.random.default_rng(0)
    before, after = ({n: rng.normal(size=s) for n, s in zip(("lora_a", "lora_b"), shapes, strict=True)} for _ in "ab")
    found = jax.jit(update_terms)(before, after)["lora"]
    pairs = [matrices(tree["lora_a"], tree["lora_b"]) for tree in (before, after)]
    expected = [
        [np.linalg.norm(p) for p in (a @ (new_b - b), (new_a - a) @ b, (new_a - a) @ (new_b - b))]
        for (a, b), (new_a, new_b) in zip(*pairs, strict=True)
    ]
    assert found.delta_1.shape == (shapes[0][:1] if len(shapes[0]) == 3 else ())
    np.testing.assert_allclose(np.stack(found, -1).reshape(-1, 3), expected, rtol=1e-5)
