"""A decoder of a few thousand parameters, and the same one written as a Hugging Face directory."""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from stable_lora_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    max_positions=64,
)


def config(**changes: Any) -> DecoderConfig:
    if changes.get("qkv_bias"):  # what a Hugging Face file says of one that has biases there
        changes = {"model_type": "qwen2", **changes}
    return DecoderConfig(**{**{name: getattr(CONFIG, name) for name in asdict(CONFIG)}, **changes})


def decoder(**changes: Any) -> Decoder:
    """A random decoder whose weights are large enough that attention is far from uniform; each call a fresh copy."""
    return nnx.clone(_decoder(**changes))


@functools.cache
def _decoder(dtype=jnp.float32, remat=False, **changes: Any) -> Decoder:
    # Filled from NumPy: the decoder's own initialisation costs seconds of compilation per configuration.
    model = nnx.eval_shape(lambda: Decoder(config(**changes), rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
    random = np.random.default_rng(0)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        mean, std = {"kernel": (0, 0.15), "scale": (1, 0.1), "bias": (0, 0.5), "embedding": (0, 0.5)}[str(path[-1])]
        param.set_value(jnp.asarray(random.normal(mean, std, param.shape), jnp.float32))
    return model


@nnx.jit
def call(model: Decoder, *args: jax.Array) -> jax.Array:
    return model(*args)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(1, CONFIG.vocab_size, (batch, length)))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }


def hf_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """Names and orientation written out by hand, independently of the package's own table."""
    tensors = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        value, module = np.asarray(param.get_value()), ".".join(map(str, path[:-1]))
        leaf = "bias" if path[-1] == "bias" else "weight"
        turn = np.transpose if path[-1] == "kernel" else np.asarray
        if path[0] == "layers":
            for layer, one in enumerate(value):
                name = f"model.layers.{layer}.{module.removeprefix('layers.')}.{leaf}"
                tensors[name] = np.ascontiguousarray(turn(one))
        else:
            tensors[f"{'' if module == 'lm_head' else 'model.'}{module}.{leaf}"] = np.ascontiguousarray(turn(value))
    return tensors


def save(directory: Path, config: DecoderConfig, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**hf_config(config), **changes}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def save_with_tokenizer(directory: Path, max_positions: int = 256) -> Path:
    """A Hugging Face directory with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(exist_ok=True)
    changes = {"vocab_size": 260, "max_positions": max_positions}
    save(directory, config(**changes), hf_tensors(decoder(**changes)), model_type="llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory
