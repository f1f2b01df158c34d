"""Decoders that adapters train on: ten families in Flax NNX, loaded from Hugging Face or GGUF files."""

from stable_lora_jax.extras import needs

with needs("train"):
    from stable_lora_jax.models.attention import ATTENTIONS, attend, choose_attention
    from stable_lora_jax.models.cache import KVCache, init_cache
    from stable_lora_jax.models.config import DecoderConfig
    from stable_lora_jax.models.decoder import Decoder
    from stable_lora_jax.models.generation import generate, stream
    from stable_lora_jax.models.gguf_adapter import save_gguf_adapter
    from stable_lora_jax.models.hf_config import config_from_hf
    from stable_lora_jax.models.huggingface import huggingface_module, joined_modules, save_huggingface
    from stable_lora_jax.models.loading import load_model
    from stable_lora_jax.models.rope_scaling import (
        LinearRopeScaling,
        Llama3RopeScaling,
        LongRopeScaling,
        YarnRopeScaling,
    )

__all__ = [
    "ATTENTIONS",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "LinearRopeScaling",
    "Llama3RopeScaling",
    "LongRopeScaling",
    "YarnRopeScaling",
    "attend",
    "choose_attention",
    "config_from_hf",
    "generate",
    "huggingface_module",
    "init_cache",
    "joined_modules",
    "load_model",
    "save_gguf_adapter",
    "save_huggingface",
    "stream",
]
