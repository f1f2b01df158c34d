"""Reads and writes the config.json of a Hugging Face directory.

Every key is either read, or must have the value under which this package computes what transformers does, or is known
to change nothing. Any other key is refused by name, so that no model loads and then answers wrongly.
"""

from collections.abc import Mapping
from typing import Any

from stable_lora_jax.models.config import DecoderConfig, Llama3RopeScaling

# model_type, which transformers goes by -> its class; the second has a bias on q, k and v.
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_READ = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings",
    "layer_types",
}  # fmt: skip
# Keys that change the computation, with the values under which they do not. None is always one of them.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "auto_map": (),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
# Keys that change nothing here: names, tokens, the start of training, outputs, generation. The two about windows have
# an effect with use_sliding_window alone.
_HARMLESS = {
    "_name_or_path", "_attn_implementation", "attn_implementation", "transformers_version", "torch_dtype", "dtype",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "initializer_range",
    "use_cache", "pretraining_tp", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "tokenizer_class", "task_specific_params", "finetuning_task",
    "is_encoder_decoder", "is_llama_config", "temperature", "top_p", "top_k", "do_sample", "max_length",
    "max_new_tokens", "min_length", "repetition_penalty", "use_bfloat16", "torchscript", "prefix", "sliding_window",
    "max_window_layers", "transformers.js_config", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_ROPE_READ = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a parsed Hugging Face config.json.

    Rotary settings are read from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    Args:
        raw: the parsed file; its `model_type`, or without one its `architectures`, must be Llama or Qwen2.

    Raises:
        ValueError: another architecture, a key that is not known or whose value is not supported, settings that
            contradict each other, a key that is missing, or a number that is none.
    """
    model_type = _model_type(raw)
    _refuse_unknown(raw)
    rope = _rope_parameters(raw)
    num_heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    return DecoderConfig(
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
        head_dim=_integer(raw, "head_dim", hidden_size // max(num_heads, 1)),
        rms_norm_eps=_number(raw, "rms_norm_eps"),
        max_positions=_integer(raw, "max_position_embeddings"),
        rope_theta=_number(rope, "rope_theta", 10_000.0),
        rope_scaling=_llama3_scaling(rope) if rope["rope_type"] == "llama3" else None,
        qkv_bias=model_type == "qwen2",
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """What `config_from_hf` reads: the config.json of a decoder, for transformers too.

    It names no start and end token, of which a decoder knows nothing; left out, transformers would take 1 and 2.
    """
    model_type = "qwen2" if config.qkv_bias else "llama"
    raw = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if (scaling := config.rope_scaling) is not None:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return raw


def _model_type(raw: Mapping[str, Any]) -> str:
    """Returns llama or qwen2, by `model_type` if there is one: transformers goes by it, whatever else is named."""
    architectures = raw.get("architectures")
    named = [each for each in architectures if isinstance(each, str)] if isinstance(architectures, list) else []
    by_class = {architecture: model_type for model_type, architecture in _ARCHITECTURES.items()}
    model_type = raw.get("model_type") or (by_class.get(named[0]) if len(named) == 1 else None)
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type={raw.get('model_type')!r}, architectures={architectures}; supported are "
            f"{', '.join(f'{kind} ({name})' for kind, name in _ARCHITECTURES.items())}; convert the model to one of "
            "these or choose another model."
        )
    return model_type


def _refuse_unknown(raw: Mapping[str, Any]) -> None:
    """Raises ValueError at a key that may change the computation."""
    layer_types = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list) or any(each != "full_attention" for each in layer_types):
        raise _unsupported("layer_types", layer_types, "'full_attention' only")
    for name, value in raw.items():
        if name in _ALLOWED:
            allowed = _ALLOWED[name]
            if value is not None and value not in allowed:
                raise _unsupported(name, value, " or ".join(map(repr, allowed)) or "to leave it out")
        elif name not in _READ | _HARMLESS:
            raise ValueError(
                f"config.json: the key {name} (here {value!r}) is not known; it may change what the model computes; "
                "remove it if it does not, or choose a model without it."
            )


def _unsupported(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"config.json: {name}={value!r} is not supported; allowed is {allowed}; choose a model without this feature."
    )


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings of both places, which must agree, with a rope_type."""
    merged: dict[str, Any] = {}
    top = {name: raw.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    places = {
        "config.json": top,
        "rope_parameters": raw.get("rope_parameters"),
        "rope_scaling": raw.get("rope_scaling"),
    }
    for place, settings in places.items():
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise ValueError(f"config.json: {place}={settings!r} is no object; take the file of the weights.")
        settings = dict(settings)
        if "rope_type" not in settings and "type" in settings:
            settings["rope_type"] = settings.pop("type")
        if place != "config.json":
            settings.setdefault("rope_type", "default")
        for name, value in settings.items():
            if value is None:
                continue
            if name not in _ROPE_READ | _LLAMA3:
                raise ValueError(
                    f"config.json: the key {name} (here {value!r}) of {place} is not known; it may change what the "
                    "model computes; choose a model without it."
                )
            if merged.setdefault(name, value) != value:
                raise ValueError(
                    f"config.json: {place} says {name}={value!r}, another place says {merged[name]!r}; they must "
                    "agree; take the file of the weights, or remove the one that is wrong."
                )
    merged.setdefault("rope_type", "default")
    if merged["rope_type"] not in ("default", "llama3"):
        raise _unsupported("rope_type", merged["rope_type"], "'default' or 'llama3'")
    if merged.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("partial_rotary_factor", merged["partial_rotary_factor"], "1.0")
    if "rope_theta" not in merged and "rope_theta" in raw:
        raise ValueError("config.json: rope_theta is null; it must be a positive number; remove the key for 10000.")
    return merged


def _llama3_scaling(rope: Mapping[str, Any]) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_positions=_integer(rope, "original_max_position_embeddings"),
    )


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name)
    if value is None:
        if default is not None:
            return default
        raise ValueError(
            f"config.json: key {name!r} is missing; a decoder cannot be built without it; "
            "take the config.json that belongs to the weights."
        )
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} is no number; write it as one, without quotes.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"config.json: {name} has {len(str(value))} digits; correct it.") from None


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = float(_number(raw, name, default))
    if not value.is_integer() or abs(value) > 2**53:
        raise ValueError(f"config.json: {name}={raw[name]!r} is no whole number; take the file of the weights.")
    return int(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name}={value!r} is neither true nor false; correct it.")
    return bool(value)
