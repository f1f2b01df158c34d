"""Small least-squares problems with LoRA pairs, on which every optimizer must converge.

Each is (params, loss): start from A ~ N(0, 1/n), B = 0, and fit ``x (W0 + A B) = y`` where y comes from a W0 + ΔW of
rank r.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _pair(rng, n, r, m, stack=()):
    return {
        "lora_a": jnp.asarray(rng.normal(size=(*stack, n, r)) / np.sqrt(n), jnp.float32),
        "lora_b": jnp.zeros((*stack, r, m), jnp.float32),
    }


def _data(rng, n, r, m, stack=()):
    x = rng.normal(size=(*stack, 32, n))
    delta = rng.normal(size=(*stack, n, r)) @ rng.normal(size=(*stack, r, m)) / np.sqrt(r * n)
    return jnp.asarray(x, jnp.float32), jnp.asarray(x @ delta, jnp.float32)


def _error(pair, x, y):
    return jnp.mean((x @ pair["lora_a"] @ pair["lora_b"] - y) ** 2)


def symmetric():
    """n = m: both orientations of the pair share two axes."""
    rng = np.random.default_rng(1)
    x, y = _data(rng, 12, 4, 12)
    return {"q": _pair(rng, 12, 4, 12)}, lambda params: _error(params["q"], x, y)


def asymmetric():
    """Two pairs of different shapes, one of them much wider than tall."""
    rng = np.random.default_rng(2)
    q, v = _data(rng, 24, 2, 6), _data(rng, 5, 2, 20)
    params = {"q": _pair(rng, 24, 2, 6), "v": _pair(rng, 5, 2, 20)}
    return params, lambda params: _error(params["q"], *q) + _error(params["v"], *v)


def mixed():
    """Pairs of two ranks beside a trained bias and a kernel whose gradient is zero."""
    rng = np.random.default_rng(3)
    x, y = _data(rng, 12, 4, 8)
    x_q, y_q = _data(rng, 9, 2, 7)
    kernel = jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
    params = {"v": _pair(rng, 12, 4, 8) | {"kernel": kernel, "bias": jnp.zeros(8)}, "q": _pair(rng, 9, 2, 7)}

    def loss(params):
        v = params["v"]
        frozen = jax.lax.stop_gradient(v["kernel"])
        moved = x @ (frozen - kernel) + x @ v["lora_a"] @ v["lora_b"] + v["bias"]
        return jnp.mean((moved - (y + 0.5)) ** 2) + _error(params["q"], x_q, y_q)

    return params, loss


def stacked():
    """Three layers in one leaf."""
    rng = np.random.default_rng(4)
    x, y = _data(rng, 16, 2, 8, stack=(3,))
    return {"layers": _pair(rng, 16, 2, 8, stack=(3,))}, lambda params: _error(params["layers"], x, y)


PROBLEMS = {"symmetric": symmetric, "asymmetric": asymmetric, "mixed": mixed, "stacked": stacked}
