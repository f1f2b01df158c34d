from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stable_lora_jax.models import generate, generation, stream
from tests.models import tiny
from tests.models.test_decoder import noisy_decoder

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [58]]


def greedy_without_cache(model, prompt, steps):
    tokens = jnp.zeros((1, 16), int).at[0, : len(prompt)].set(jnp.array(prompt))
    for position in range(len(prompt), len(prompt) + steps):
        tokens = tokens.at[0, position].set(jnp.argmax(tiny.call(model, tokens)[0, position - 1]))
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


@pytest.fixture(scope="module")
def model():
    return tiny.decoder()


def test_greedy_equals_repeated_full_passes(model):
    answers = generate(model, PROMPTS, max_new_tokens=6)
    assert answers == [greedy_without_cache(model, prompt, 6) for prompt in PROMPTS]


def test_end_token_stops_one_row_only(model):
    free = generate(model, PROMPTS, max_new_tokens=6)
    end = free[0][2]
    stopped = generate(model, PROMPTS, max_new_tokens=6, eos_id=end)
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_id": 7},
        {"temperature": 0.8, "key": jax.random.key(1)},
        {"temperature": 2.0, "key": jax.random.key(1), "top_k": 5, "top_p": 0.7},
    ],
)
def test_stream_gives_the_same_tokens(model, options):
    whole = generate(model, PROMPTS[:1], max_new_tokens=6, **options)[0]
    assert list(stream(model, PROMPTS[0], max_new_tokens=6, **options)) == whole


def test_sampling_follows_the_key_and_the_temperature(model):
    def sample(seed, temperature):
        return generate(model, PROMPTS, max_new_tokens=6, temperature=temperature, key=jax.random.key(seed))

    assert sample(0, 2.0) == sample(0, 2.0)
    assert sample(0, 2.0) != sample(1, 2.0)
    assert sample(0, 1e-5) == generate(model, PROMPTS, max_new_tokens=6)


def test_top_k_and_top_p_draw_from_the_likeliest(model):
    logits = tiny.call(model, jnp.array([[3, 1, 4]]))[0, -1]
    probabilities = np.asarray(jax.nn.softmax(logits / 1.5), np.float64)
    falling = np.argsort(-probabilities)

    def drawn(**options):
        keys = (jax.random.key(seed) for seed in range(60))
        return {
            generate(model, [[3, 1, 4]], max_new_tokens=1, temperature=1.5, key=key, **options)[0][0] for key in keys
        }

    assert drawn(top_k=3) <= {*falling[:3].tolist()}
    assert len(drawn(top_k=3)) > 1
    assert drawn(top_k=1) == drawn(top_p=1e-9) == {int(falling[0])}
    fewest = 1 + int(np.argmax(np.cumsum(probabilities[falling]) >= 0.5))
    assert fewest > 2
    assert drawn(top_p=0.5) <= {*falling[:fewest].tolist()}
    assert drawn(top_k=2, top_p=1.0) <= {*falling[:2].tolist()}
    assert drawn() - {*falling[:fewest].tolist()}


def test_every_token_is_drawn_anew(model):
    (answer,) = generate(model, [[3]], max_new_tokens=20, temperature=1e6, key=jax.random.key(0))
    assert len(set(answer)) > 5  # of one draw for all, nearly flat logits would make one token


def test_same_shapes_compile_once(model):
    generate(model, PROMPTS, max_new_tokens=6)
    compiled: Any = generation._generate
    before = compiled._cache_size()
    generate(model, [[7], [8, 9], [10] * 16], max_new_tokens=6, eos_id=3)
    assert compiled._cache_size() == before


def test_adapters_generate_without_dropout_and_keep_their_mode():
    model, adapter = noisy_decoder()
    assert generate(model, PROMPTS, max_new_tokens=6) == generate(model, PROMPTS, max_new_tokens=6)
    assert adapter.dropout.deterministic is False
    assert adapter.dropout.rngs.count[...].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "0 prompts"),
        ([[1], []], {}, r"lengths \[1, 0\].*none may be empty"),
        ([[1, 61], [-1, 5]], {}, r"hold the tokens \[-1, 61\]; the model knows 0 to 60"),
        ([[1] * 60], {"max_new_tokens": 5}, "max_new_tokens=5 after a prompt of 60.*allow 1 to 4"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": 0.5}, "temperature=0.5 with key=None"),
        ([[1]], {"top_k": 0}, "top_k=0, top_p=None; allowed are top_k from 1"),
        ([[1]], {"top_p": 1.5}, "top_k=None, top_p=1.5"),
        ([[1]], {"top_p": 0.5}, "temperature 0 draws nothing"),
    ],
)
def test_errors(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, **options})
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            stream(model, prompts[0], **{"max_new_tokens": 2, **options})
