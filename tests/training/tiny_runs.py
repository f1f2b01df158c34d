"""A tiny adapted decoder and made-up questions, for the tests of training, evaluation and the command line."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stable_lora_jax.data import Encoded
from stable_lora_jax.lora import inject_lora, lora_modules
from stable_lora_jax.models import Decoder
from tests.models import tiny

VOCAB = 64  # divided by every mesh of eight devices, as all of the tiny decoder's widths are


def adapted(*, dropout: float = 0.0, b_std: float = 0.05, **changes: Any) -> Decoder:
    """A tiny decoder with adapters whose A and B are random, so that both have gradients; the same for any dropout."""
    model = tiny.decoder(**{"vocab_size": VOCAB} | changes)
    inject_lora(model, 2, 4.0, "qv", rngs=nnx.Rngs(1), dropout=dropout)
    for i, module in enumerate(lora_modules(model).values()):
        a, b = jax.random.split(jax.random.key(i))
        module.lora_a[...] = 0.2 * jax.random.normal(a, module.lora_a.shape)
        module.lora_b[...] = b_std * jax.random.normal(b, module.lora_b.shape)
    return model


def questions(count: int, *, seed: int = 0, num_branches: int = 4) -> list[Encoded]:
    """Questions of unequal length with unequal answers; every third has one answer fewer."""
    random = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(random.integers(1, 61, random.integers(low, high)).tolist())

    made = []
    for i in range(count):
        branches = tuple(tokens(1, 6) for _ in range(num_branches - (i % 3 == 2)))
        made.append(Encoded(tokens(3, 12), branches, int(random.integers(len(branches)))))
    return made


def naive_log_likelihoods(model: Decoder, example: Encoded) -> list[jax.Array]:
    """Log p of each answer, every one in a row of its own through the plain, causal forward pass."""
    tokens = np.zeros((4, 20), np.int32)  # one shape for all; nothing looks at what stands behind
    for row, branch in enumerate(example.branches):
        tokens[row, : len(example.prefix + branch)] = example.prefix + branch
    log_p = jax.nn.log_softmax(tiny.call(model, jnp.asarray(tokens)))
    first = len(example.prefix) - 1
    return [log_p[i, np.arange(len(b)) + first, np.array(b)].sum() for i, b in enumerate(example.branches)]


def trees_equal(one: Any, other: Any) -> bool:
    """Whether two trees hold the same bits."""
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), one, other)
    return jax.tree.all(same)
