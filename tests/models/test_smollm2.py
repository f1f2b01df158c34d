"""The real SmolLM2-135M from its GGUF file."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from stable_lora_jax.models import generate, load_model
from tests.models import tiny

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = [7042, 30]  # " Paris."
PARAMETER_BYTES = 134_515_008 * 4
LARGEST_TENSOR_BYTES = 49_152 * 576 * 4

# On Linux ru_maxrss is in KiB; what importing and starting JAX needs is taken off.
MEASURE = """
import resource
import jax.numpy as jnp
from stable_lora_jax.models import load_model
jnp.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_model("smollm2-135m")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(scope="module")
def file():
    from stable_lora_jax.assets.packaged import smollm2_gguf

    return smollm2_gguf()


@pytest.fixture(scope="module")
def model(file):
    return load_model(file)


def test_greedy_continuation(model):
    assert generate(model, [PROMPT], max_new_tokens=2) == [PARIS]


def test_equals_transformers(model, file):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 49_152, (2, 24))
    with torch.no_grad():
        expected = reference(torch.asarray(tokens)).logits.numpy()
        prompt = torch.tensor([PROMPT])
        answer = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=20, max_new_tokens=20, do_sample=False
        )
    # Float32 sums in another order through 30 layers; logits reach 30.
    assert np.abs(tiny.call(model, jnp.asarray(tokens)) - expected).max() <= 2e-3
    assert generate(model, [PROMPT], max_new_tokens=20)[0] == answer[0, len(PROMPT) :].tolist()


def test_loading_needs_little_more_memory_than_the_model(file):
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= PARAMETER_BYTES + LARGEST_TENSOR_BYTES + 300e6
