"""Base models for cells: the weights are loaded once in a process."""

import functools

from flax import nnx

from stable_lora_jax.finetune import ModelConfig, load_base
from stable_lora_jax.models import Decoder


def shared_base(config: ModelConfig) -> Decoder:
    """Returns a base model of its own to put an adapter into; its weights are loaded once in a process."""
    return nnx.merge(*_split_base(config.name, config.dtype, config.quantize))


@functools.lru_cache(maxsize=1)
def _split_base(name: str, dtype: str, quantize: str | None) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(load_base(name, dtype, quantize))
