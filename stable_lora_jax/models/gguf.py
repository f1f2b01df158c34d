"""Opens a GGUF file of the llama or qwen2 architecture; quantised tensors are dequantised to float32.

Two traps. A llama file stores the rows of query and key projections with each rotary pair side by side, and they are
put back into halves here; a qwen2 file does not. And a Llama 3 file says nothing of its rotary scaling but a tensor
of factors, from which the scaling is recovered and checked.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stable_lora_jax.assets import read_gguf_metadata
from stable_lora_jax.models.checkpoint import Checkpoint, Part
from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.rope_scaling import Llama3RopeScaling
from stable_lora_jax.models.rotary import rotary_frequencies

_ARCHITECTURES = ("llama", "qwen2")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_ROPE_FACTORS = "rope_freqs.weight"
# Module of a `Decoder` -> its name in a GGUF file.
MODULES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.input_layernorm": "attn_norm",
    "layers.self_attn.q_proj": "attn_q",
    "layers.self_attn.k_proj": "attn_k",
    "layers.self_attn.v_proj": "attn_v",
    "layers.self_attn.o_proj": "attn_output",
    "layers.post_attention_layernorm": "ffn_norm",
    "layers.mlp.gate_proj": "ffn_gate",
    "layers.mlp.up_proj": "ffn_up",
    "layers.mlp.down_proj": "ffn_down",
}


def open_gguf(file: Path) -> Checkpoint:
    """Returns the checkpoint in a GGUF file.

    Raises:
      ValueError: the file is damaged, or its architecture, a feature or a tensor type is not supported.
    """
    read_gguf_metadata(file)  # the package believes every length that a header claims
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{file} is not a whole GGUF file: {error}; download it again.") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    _refuse_unsupported(fields, tensors)
    config = _config(fields, tensors)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def read(name: str, part: Part) -> np.ndarray:
        value = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        module = name.split(".")[-2]
        if fields["general.architecture"] == "llama" and module in heads:
            value = _pairs_to_halves(value, heads[module])
        return value[part]

    return Checkpoint(
        config=config,
        shapes={name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in tensors.items() if name != _ROPE_FACTORS},
        tensor_name=_tensor_name,
        read=read,
    )


def _tensor_name(path: str, layer: int | None) -> str:
    module, leaf = path.rsplit(".", 1)
    prefix = "" if layer is None else f"blk.{layer}."
    return f"{prefix}{MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _pairs_to_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns rows of each head ordered (first half, second half) instead of (first, second, first, second, ...)."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _refuse_unsupported(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"GGUF: general.architecture={architecture!r}; supported are {', '.join(_ARCHITECTURES)}; "
            "choose a model of one of these."
        )
    allowed_values = {"rope.scaling.type": ("none",), "expert_count": (0,)}
    for name, allowed in allowed_values.items():
        value = fields.get(f"{architecture}.{name}", allowed[0])
        if value not in allowed:
            raise ValueError(
                f"GGUF: {architecture}.{name}={value!r} is not supported; allowed is {allowed[0]!r}; "
                "choose a model without this feature."
            )
    for name, tensor in tensors.items():
        if tensor.tensor_type.name not in _TYPES:
            raise ValueError(
                f"GGUF: tensor {name} has type {tensor.tensor_type.name}; allowed are {', '.join(_TYPES)}; "
                "choose a file quantised to one of these."
            )


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> DecoderConfig:
    architecture = fields["general.architecture"]

    def value(name: str, default: Any = None) -> Any:
        found = fields.get(f"{architecture}.{name}", default)
        if found is None:
            raise ValueError(
                f"GGUF: field {architecture}.{name} is missing; a decoder cannot be built without it; "
                "download or convert the file again."
            )
        return found

    if "token_embd.weight" not in tensors:
        raise ValueError("GGUF: tensor token_embd.weight is missing; every decoder has it; download the file again.")
    num_heads, width, theta = value("attention.head_count"), value("embedding_length"), value("rope.freq_base", 1e4)
    head_dim = value("attention.key_length", width // num_heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"GGUF: rope.dimension_count={value('rope.dimension_count')}; it must be the head width {head_dim}; "
            "choose a model whose rotary embedding covers the whole head."
        )
    factors = tensors.get(_ROPE_FACTORS)
    return DecoderConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        max_positions=value("context_length"),
        rope_theta=theta,
        rope_scaling=None if factors is None else _recover_scaling(np.asarray(factors.data), head_dim, theta),
        qkv_bias=architecture == "qwen2",
        tie_embeddings="output.weight" not in tensors,
        model_type=architecture,
    )


def _recover_scaling(factors: np.ndarray, head_dim: int, theta: float) -> Llama3RopeScaling:
    """Returns the one scaling all Llama 3 models share but for its factor, if it gives exactly the stored factors."""
    scaling = Llama3RopeScaling(
        factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    expected = rotary_frequencies(head_dim, theta, None) / rotary_frequencies(head_dim, theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"GGUF: {_ROPE_FACTORS} holds factors up to {factors.max():g} that are not Llama 3's; allowed are the "
            "factors of Llama 3.1 and later; load this model from its safetensors files instead."
        )
    return scaling
