"""The real tokenizer, built once."""

import pytest
from transformers import PreTrainedTokenizerBase

from stable_lora_jax.data import SMOLLM2, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(SMOLLM2)
