"""Where the families of Hugging Face models differ: what each one's config.json says, and what it leaves to a default.

A family is data: its class, the defaults of keys whose absence means something else than in Llama, the keys that it
reads beyond those of all, and two functions, from the keys to fields of `DecoderConfig` and back.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.hf_values import flag, integer

Fields = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's config.json is read and written.

    Attributes:
      architecture: the class in transformers.
      defaults: key -> value that transformers takes where the key is missing.
      read: keys read beyond those of all families; others of them are refused unless they change nothing.
      allowed: key -> values under which a key that is not read changes nothing.
      fields: from the keys to fields of `DecoderConfig`.
      keys: from a configuration to the keys that its fields stand for.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fields: Callable[[Mapping[str, Any]], Fields] = lambda raw: {}
    keys: Callable[[DecoderConfig], Fields] = lambda config: {}


def _biases(raw: Mapping[str, Any]) -> Fields:
    attention = flag(raw, "attention_bias")
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": flag(raw, "mlp_bias")}


def _biases_back(config: DecoderConfig) -> Fields:
    return {"attention_bias": config.o_bias} | ({"mlp_bias": True} if config.mlp_bias else {})


def _whole(raw: Mapping[str, Any], name: str) -> int | None:
    return None if raw.get(name) is None else integer(raw, name)


def _kinds(raw: Mapping[str, Any], default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Returns which layers slide: by layer_types, else by a family's own rule."""
    layers = _whole(raw, "num_hidden_layers") or 0
    named = raw.get("layer_types")
    if named is None:
        return tuple(default(layer) for layer in range(layers))
    if not isinstance(named, list) or len(named) != layers or any(each not in (FULL, SLIDING) for each in named):
        raise ValueError(
            f"config.json: layer_types={named!r}; it must be a list of {layers}, each {FULL!r} or {SLIDING!r}; take "
            "the file of the weights."
        )
    return tuple(each == SLIDING for each in named)


def _windows(raw: Mapping[str, Any], slides: tuple[bool, ...]) -> Fields:
    """Returns the window and the layers that have it; nothing, where none has."""
    window = _whole(raw, "sliding_window")
    if window is None or not any(slides):
        return {}
    return {"sliding_window": window, "sliding_layers": () if all(slides) else slides}


def _layer_types(config: DecoderConfig) -> list[str]:
    return [SLIDING if config.slides(layer) else FULL for layer in range(config.num_layers)]


def _qwen_windows(raw: Mapping[str, Any]) -> Fields:
    """Returns the windows of use_sliding_window: in the layers from max_window_layers on, or those that are named."""
    used, first = flag(raw, "use_sliding_window"), _whole(raw, "max_window_layers") or 0
    slides = _kinds(raw, lambda layer: used and layer >= first)
    if any(slides) and not used:
        raise ValueError(
            "config.json: layer_types names sliding layers, use_sliding_window is not set; they contradict each other; "
            "take the file of the weights."
        )
    return _windows(raw, slides)


def _qwen_windows_back(config: DecoderConfig) -> Fields:
    if config.sliding_window is None:
        return {}
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
        "max_window_layers": 0,
    }


def _rope_layers(raw: Mapping[str, Any]) -> Fields:
    """Returns which layers of SmolLM3 rotate: 1 or 0 per layer, or every so many-th does not."""
    layers, given = _whole(raw, "num_hidden_layers") or 0, raw.get("no_rope_layers")
    every = _whole(raw, "no_rope_layer_interval") or 4
    rotates = tuple((layer + 1) % every != 0 for layer in range(layers)) if given is None else given
    if not isinstance(rotates, list | tuple) or len(rotates) != layers or any(each not in (0, 1) for each in rotates):
        raise ValueError(
            f"config.json: no_rope_layers={given!r}; it must be a list of {layers}, each 0 or 1; correct it."
        )
    return {"rope_layers": () if all(rotates) else tuple(map(bool, rotates))}


def _gemma3(raw: Mapping[str, Any]) -> Fields:
    every = _whole(raw, "sliding_window_pattern") or _whole(raw, "_sliding_window_pattern") or 6
    width = _whole(raw, "hidden_size") or 0
    return _biases(raw) | _windows(raw, _kinds(raw, lambda layer: bool((layer + 1) % every))) | {
        "norms": "both",
        "norm_offset": 1.0,
        "qk_norm": "head",
        "activation": "gelu_tanh",
        "embedding_scale": width**0.5,
        "attention_scale": float(raw["query_pre_attn_scalar"]) ** -0.5,
    }  # fmt: skip


def _gemma3_back(config: DecoderConfig) -> Fields:
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    return {
        "attention_bias": config.o_bias,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


def _granite(raw: Mapping[str, Any]) -> Fields:
    return _biases(raw) | {
        "embedding_scale": float(raw["embedding_multiplier"]),
        "residual_scale": float(raw["residual_multiplier"]),
        "attention_scale": float(raw["attention_multiplier"]),
        "logits_scale": 1 / float(raw["logits_scaling"]),
    }


def _granite_back(config: DecoderConfig) -> Fields:
    return _biases_back(config) | {
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": 1 / config.logits_scale,
    }


_BIASES = frozenset({"attention_bias", "mlp_bias"})
_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", read=_BIASES, fields=_biases, keys=_biases_back),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults={"num_key_value_heads": 32, "max_window_layers": 28},
        read=_WINDOWS,
        fields=lambda raw: {"qkv_bias": True} | _qwen_windows(raw),
        keys=_qwen_windows_back,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
        read=_WINDOWS | {"attention_bias"},
        fields=lambda raw: {"qk_norm": "head"} | _biases(raw) | _qwen_windows(raw),
        keys=lambda config: {"attention_bias": config.o_bias} | _qwen_windows_back(config),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        read=frozenset({"sliding_window"}),
        fields=lambda raw: _windows(raw, (True,)),
        keys=lambda config: {"sliding_window": config.sliding_window},
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        read=frozenset({"sliding_window"}),
        fields=lambda raw: _windows(raw, _kinds(raw, lambda _: raw.get("sliding_window") is not None)),
        keys=lambda config: {"sliding_window": config.sliding_window, "layer_types": _layer_types(config)},
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults={"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
        read=_BIASES | {"no_rope_layers", "no_rope_layer_interval"},
        fields=lambda raw: _biases(raw) | _rope_layers(raw),
        keys=lambda config: (
            {"no_rope_layers": [int(config.rotates(layer)) for layer in range(config.num_layers)]}
            | _biases_back(config)
        ),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        read=frozenset({"attention_bias"}),
        fields=lambda raw: {"norms": "post", "qk_norm": "projection"} | _biases(raw),
        keys=lambda config: {"attention_bias": config.o_bias},
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults=dict.fromkeys(_MULTIPLIERS, 1.0),
        read=_BIASES | frozenset(_MULTIPLIERS),
        fields=_granite,
        keys=_granite_back,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        read=frozenset(
            {"attention_bias", "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern"}
            | {"_sliding_window_pattern", "rope_local_base_freq"}
        ),
        allowed={
            "attn_logit_softcapping": (),
            "cache_implementation": ("hybrid",),
            "final_logit_softcapping": (),
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
        },
        fields=_gemma3,
        keys=_gemma3_back,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={"original_max_position_embeddings": 4096},
        read=frozenset({"sliding_window", "partial_rotary_factor"}),
        allowed={
            "embd_pdrop": (0.0,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
            "lm_head_bias": (False,),
            "resid_pdrop": (0.0,),
        },
        fields=lambda raw: _windows(raw, (True,)),
        keys=lambda config: {"sliding_window": config.sliding_window},
    ),
}
