"""The known shapes have the number of parameters that their models are published with."""

import jax
import pytest
from flax import nnx

from stable_lora_jax.models import Decoder
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS

PUBLISHED = {
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_number_of_parameters(name, count):
    decoder = nnx.eval_shape(lambda: Decoder(KNOWN_CONFIGS[name], rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder))) == count


def test_every_known_config_is_tested():
    assert KNOWN_CONFIGS.keys() == PUBLISHED.keys()
