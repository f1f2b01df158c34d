"""Chunked log-likelihoods against plain ones: values, gradients, and how much of the logits is ever in memory."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stable_lora_jax.models import chunked_head
from stable_lora_jax.models.chunked_head import chunked_log_likelihoods


def plain(hidden, targets, weight, vocab_axis):
    logits = jnp.einsum("bpd,vd->bpv" if vocab_axis == 0 else "bpd,dv->bpv", hidden, weight)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def inputs(rows=3, count=23, width=16, vocabulary=101, vocab_axis=0, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shape = (vocabulary, width) if vocab_axis == 0 else (width, vocabulary)
    hidden, weight = rng.normal(size=(rows, count, width)), rng.normal(size=shape)
    targets = jnp.asarray(rng.integers(0, vocabulary, (rows, count)))
    return jnp.asarray(hidden, dtype), targets, jnp.asarray(weight, dtype)


@pytest.fixture(params=[2**28, 4 * 3 * 101 * 5, 1], ids=["one chunk", "of five, the last short", "of one"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_equals_the_plain_one(chunk_bytes, vocab_axis):
    hidden, targets, weight = inputs(vocab_axis=vocab_axis)
    cotangents = jnp.asarray(np.random.default_rng(1).normal(size=targets.shape), jnp.float32)

    def total(log_p, hidden, weight):
        return jnp.sum(cotangents * log_p(hidden, targets, weight, vocab_axis))

    for argnums in (0, 1, (0, 1)):
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda h, w, log_p=log_p: total(log_p, h, w), argnums=argnums))(hidden, weight)
            for log_p in (chunked_log_likelihoods, plain)
        )
        chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(jnp.abs(theirs[0])))
    ours = jax.vmap(lambda h: chunked_log_likelihoods(h, targets, weight, vocab_axis))(jnp.stack([hidden, 2 * hidden]))
    np.testing.assert_allclose(ours[1], plain(2 * hidden, targets, weight, vocab_axis), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "rows", "chunk"),
    [
        *((1024, 8, 64), (128, 8, 64), (65, 8, 65), (66, 8, 48), (4096, 4, 128), (700, 1, 384)),
        *((66, 3, 66), (400, 3, 128), (100, 32, 16), (30, 600, 1), (9, 200, 2)),
    ],
)
def test_chunks_are_whole_tiles_alike_in_size(count, rows, chunk):
    assert chunked_head.chunk_size(count, rows, 128256) == chunk
    assert 4 * rows * chunk * 128256 <= max(chunked_head.CHUNK_BYTES, 4 * rows * 128256)


def test_bfloat16_is_as_near_as_without_chunks(chunk_bytes):
    exact, rounded = inputs(), inputs(dtype=jnp.bfloat16)

    def gradient(log_p, hidden, targets, weight):
        return jax.grad(lambda hidden: log_p(hidden, targets, weight, 0).sum())(hidden)

    wanted = gradient(plain, *exact)
    found = gradient(chunked_log_likelihoods, *rounded)
    assert found.dtype == jnp.bfloat16
    assert jnp.abs(found - wanted).max() <= 2e-2 * jnp.abs(wanted).max()


def test_no_more_than_a_chunk_of_logits_is_in_memory(monkeypatch):
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 4 * 2 * 5000 * 8)
    hidden, targets, weight = inputs(rows=2, count=64, width=8, vocabulary=5000)

    def largest(log_p) -> int:
        program = jax.jit(jax.grad(lambda hidden: log_p(hidden, targets, weight, 0).sum()))
        shapes = re.findall(r"f32\[([\d,]+)\]", program.lower(hidden).compile().as_text())
        return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)

    assert largest(chunked_log_likelihoods) <= max(2 * 8 * 5000, weight.size)
    assert largest(plain) >= 2 * 64 * 5000
