"""Generation with a key-value cache: the likeliest tokens, or sampled ones.

Prompts are padded on the right to a power of two, so that calls of similar length share one compilation. Adapters are
welcome: any model whose layers still answer like a `Decoder` generates. Dropout is switched off for the generation.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from stable_lora_jax.models.cache import KVCache, init_cache
from stable_lora_jax.models.decoder import Decoder

_SMALLEST_BUCKET = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _State:
    """What generation carries from token to token; `positions` are those of `tokens`, the newest of each row."""

    tokens: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    cache: KVCache
    key: Key[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """How tokens are drawn: temperature, and (k, p) where few of them are drawn from."""

    temperature: Any  # float, or an array where it is traced
    cut: tuple[Any, Any] | None  # (top_k, top_p)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Key[Array, ""] | None = None,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, without the prompt and without the end token.

    Args:
      model: a decoder, with or without adapters.
      prompts: token ids below the model's vocabulary size; lengths may differ, none may be empty.
      max_new_tokens: most tokens to add to each prompt.
      eos_id: the token that ends an answer; None never ends early.
      temperature: 0 takes the most likely token; otherwise tokens are drawn from softmax(logits / temperature).
      top_k: draw from the k most likely tokens only (and those as likely as the last of them).
      top_p: draw from the fewest tokens only whose probabilities, at that temperature and after top_k, sum to at
        least this; in (0, 1].
      key: from `jax.random.key`; needed iff temperature > 0.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a length beyond the model's positions, a number
        out of its range or a missing key.

    Examples:
      >>> from stable_lora_jax.models import generate, load_model
      >>> model = load_model("smollm2-135m")  # doctest: +SKIP
      >>> generate(model, [[504, 3575, 282, 4649, 314]], max_new_tokens=2)  # doctest: +SKIP
      [[7042, 30]]
    """
    tokens, lengths = _pad(model, prompts, max_new_tokens)
    key, how = _checked(temperature, top_k, top_p, key)
    graph, params = nnx.split(model)
    end = -1 if eos_id is None else eos_id
    answers = np.asarray(_generate(graph, params, tokens, lengths, key, how, end, steps=max_new_tokens)).tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]


def stream(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Key[Array, ""] | None = None,
) -> Iterator[int]:
    """Yields the tokens of `generate` for one prompt, each as soon as it is known; arguments and errors as there."""
    tokens, lengths = _pad(model, [prompt], max_new_tokens)
    key, how = _checked(temperature, top_k, top_p, key)
    graph, params = nnx.split(model)
    slots = tokens.shape[1] + max_new_tokens

    # A generator of its own, so that the errors above come with the call and not with the first token.
    def answer() -> Iterator[int]:
        state = _start(graph, params, tokens, lengths, key, how, slots=slots)
        for step in range(max_new_tokens):
            if step:
                state = _advance(graph, params, state, how)
            token = int(state.tokens[0])
            if token == eos_id:
                return
            yield token

    return answer()


def _pad(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts as one array padded on the right to a power of two, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.all():
        raise ValueError(
            f"generate: {len(prompts)} prompts with lengths {lengths.tolist()}; at least one prompt is needed and none "
            "may be empty; begin an empty prompt with the model's start token."
        )
    vocab_size = model.config.vocab_size
    if unknown := sorted({token for prompt in prompts for token in prompt if not 0 <= token < vocab_size}):
        raise ValueError(
            f"generate: the prompts hold the tokens {unknown[:8]}; the model knows 0 to {vocab_size - 1}; encode the "
            "prompts with the model's own tokenizer."
        )
    room = model.config.max_positions - int(lengths.max())
    if not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"generate: max_new_tokens={max_new_tokens} after a prompt of {lengths.max()}; the model's "
            f"{model.config.max_positions} positions allow 1 to {room}; shorten the prompt or ask for fewer."
        )
    bucket = max(_SMALLEST_BUCKET, 1 << (int(lengths.max()) - 1).bit_length())
    tokens = np.zeros((len(prompts), bucket), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _checked(
    temperature: float, top_k: int | None, top_p: float | None, key: Key[Array, ""] | None
) -> tuple[Key[Array, ""], _Sampling | None]:
    """Returns the key, and how tokens are drawn; None for the likeliest."""
    if not 0 <= temperature < math.inf or (temperature > 0) != (key is not None):
        raise ValueError(
            f"generate: temperature={temperature} with key={key}; allowed are temperature 0 without a key and a "
            "positive, finite temperature with one; pass key=jax.random.key(seed) to sample, or neither for greedy."
        )
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"generate: top_k={top_k}, top_p={top_p}; allowed are top_k from 1 and top_p in (0, 1].")
    if key is None and (top_k, top_p) != (None, None):
        raise ValueError(
            f"generate: top_k={top_k}, top_p={top_p} choose what is drawn from, and temperature 0 draws nothing; give "
            "a temperature above 0, or leave them out."
        )
    if key is None:
        return jax.random.key(0), None
    cut = None if (top_k, top_p) == (None, None) else (top_k or 2**31 - 1, 1.0 if top_p is None else top_p)
    return key, _Sampling(temperature=temperature, cut=cut)


def _choose(logits: Float[Array, "batch vocab"], key: Key[Array, ""], how: _Sampling | None) -> Int[Array, " batch"]:
    if how is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.cut is not None:
        top_k, top_p = how.cut
        falling = -jnp.sort(-logits, axis=-1)
        falling = jnp.where(jnp.arange(logits.shape[-1]) < top_k, falling, -jnp.inf)
        before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1) - jax.nn.softmax(falling, axis=-1)
        least = jnp.min(jnp.where((before < top_p) & (falling > -jnp.inf), falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _evaluating(graph: nnx.GraphDef, params: nnx.State) -> Decoder:
    """Returns the model without dropout; a copy, so that the caller's keeps its mode."""
    model = nnx.merge(graph, params, copy=True)
    model.eval()
    return model


@functools.partial(jax.jit, static_argnames=("graph", "slots"))
def _start(graph, params, tokens, lengths, key, how, *, slots: int) -> _State:
    """Reads the prompts and chooses the first new token of each."""
    model = _evaluating(graph, params)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    hidden, cache = model.extend(tokens, positions, init_cache(model.config, batch, slots, model.dtype))
    key, subkey = jax.random.split(key)
    last = model.logits(hidden[jnp.arange(batch), lengths - 1])
    return _State(tokens=_choose(last, subkey, how), positions=lengths, cache=cache, key=key)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="state")
def _advance(graph, params, state: _State, how) -> _State:
    """Reads the newest tokens and chooses the next."""
    model = _evaluating(graph, params)
    hidden, cache = model.extend(state.tokens[:, None], state.positions[:, None], state.cache)
    key, subkey = jax.random.split(state.key)
    tokens = _choose(model.logits(hidden[:, 0]), subkey, how)
    return _State(tokens=tokens, positions=state.positions + 1, cache=cache, key=key)


@functools.partial(jax.jit, static_argnames=("graph", "steps"))
def _generate(graph, params, tokens, lengths, key, how, end, *, steps: int):
    """Returns up to `steps` tokens per row, filled with `end` after the first `end`; stops when all rows have ended."""
    slots = tokens.shape[1] + steps
    state = _start(graph, params, tokens, lengths, key, how, slots=slots)
    answers = jnp.full((tokens.shape[0], steps), end, jnp.int32).at[:, 0].set(state.tokens)

    def unfinished(loop):
        step, _, answers = loop
        return (step < steps) & ~jnp.all(jnp.any((answers == end) & (jnp.arange(steps) < step), axis=1))

    def one_more(loop):
        step, state, answers = loop
        state = _advance(graph, params, state, how)
        return step + 1, state, answers.at[:, step].set(state.tokens)

    return jax.lax.while_loop(unfinished, one_more, (1, state, answers))[2]
