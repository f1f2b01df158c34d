"""Shapes of well-known models, by name: the values of the config.json that each was published with."""

from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.rope_scaling import Llama3RopeScaling


def _qwen2(
    layers: int,
    width: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    *,
    vocab_size: int = 151_936,
    tie_embeddings: bool = True,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rms_norm_eps=1e-6,
        max_positions=131_072,
        rope_theta=1e6,
        qkv_bias=True,
        model_type="qwen2",
        tie_embeddings=tie_embeddings,
    )


def _llama3(
    layers: int, width: int, intermediate: int, heads: int, *, rope_factor: float, tie_embeddings: bool
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=width // heads,
        rms_norm_eps=1e-5,
        max_positions=131_072,
        rope_theta=5e5,
        rope_scaling=Llama3RopeScaling(
            factor=rope_factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
        ),
        tie_embeddings=tie_embeddings,
    )


KNOWN_CONFIGS = {
    "qwen2-0.5b": _qwen2(24, 896, 4864, 14, 2),
    "qwen2-1.5b": _qwen2(28, 1536, 8960, 12, 2),
    "qwen2-7b": _qwen2(28, 3584, 18_944, 28, 4, vocab_size=152_064, tie_embeddings=False),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, rope_factor=32.0, tie_embeddings=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, rope_factor=32.0, tie_embeddings=True),
    "llama-3.1-8b": _llama3(32, 4096, 14_336, 32, rope_factor=8.0, tie_embeddings=False),
    "llama-3.1-70b": _llama3(80, 8192, 28_672, 64, rope_factor=8.0, tie_embeddings=False),
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_positions=8192,
        rope_theta=1e5,
        tie_embeddings=True,
    ),
}
