"""Reads and writes the config.json of a Hugging Face directory.

Every key is either read, or must have the value under which this package computes what transformers does, or is known
to change nothing. Any other key is refused by name, so that no model loads and then answers wrongly.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.families import FAMILIES, Family
from stable_lora_jax.models.hf_rope import read_rope, write_rope
from stable_lora_jax.models.hf_values import flag, integer, number, positive

_READ = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings",
    "layer_types", "attention_dropout", "auto_map",
}  # fmt: skip
# Keys that change the computation, with the values under which they do not. None is always one of them.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
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


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Returns the `DecoderConfig` of a parsed Hugging Face config.json.

    Rotary settings are read from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    Args:
      raw: the parsed file; its `model_type`, or without one its `architectures`, must be of a family of `FAMILIES`.

    Raises:
      ValueError: another architecture, a key that is not known or whose value is not supported, settings that
        contradict each other, a key that is missing, or a number that is none.
    """
    model_type = _model_type(raw)
    family = FAMILIES[model_type]
    raw = {**family.defaults, **raw}
    _refuse_unknown(raw, family)
    num_heads = integer(raw, "num_attention_heads")
    hidden_size = integer(raw, "hidden_size")
    head_dim = integer(raw, "head_dim", hidden_size // max(num_heads, 1))
    max_positions = integer(raw, "max_position_embeddings")
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    for name in (*multipliers, "query_pre_attn_scalar", "logits_scaling"):
        if name in family.read:
            positive(raw, name)
    return DecoderConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=integer(raw, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=number(raw, "rms_norm_eps"),
        max_positions=max_positions,
        tie_embeddings=flag(raw, "tie_word_embeddings"),
        model_type=model_type,
        **read_rope(raw, model_type, head_dim, max_positions),
        **family.fields(raw),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns what `config_from_hf` reads: the config.json of a decoder, for transformers too.

    It names no start, end and padding token, of which a decoder knows nothing; left out, transformers takes others.

    Raises:
      ValueError: the decoder's family has no way to say what it computes.
    """
    if config.model_type == "llama" and config.qkv_bias and not config.o_bias:
        config = dataclasses.replace(config, model_type="qwen2")
    family = FAMILIES[config.model_type]
    raw = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
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
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    raw |= write_rope(config) | family.keys(config)
    if "hidden_activation" in raw:
        del raw["hidden_act"]
    if (read := config_from_hf(raw)) != config:
        names = [each.name for each in dataclasses.fields(config)]
        lost = [name for name in names if getattr(read, name) != getattr(config, name)]
        raise ValueError(
            f"A {config.model_type} config.json cannot say {', '.join(f'{n}={getattr(config, n)!r}' for n in lost)}; "
            "give the configuration the model_type of a family that can."
        )
    return raw


def _model_type(raw: Mapping[str, Any]) -> str:
    """Returns the family, by `model_type` if there is one: transformers goes by it, whatever else is named."""
    architectures = raw.get("architectures")
    named = [each for each in architectures if isinstance(each, str)] if isinstance(architectures, list) else []
    by_class = {family.architecture: model_type for model_type, family in FAMILIES.items()}
    model_type = raw.get("model_type") or (by_class.get(named[0]) if len(named) == 1 else None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type={raw.get('model_type')!r}, architectures={architectures}; supported are "
            f"{', '.join(f'{kind} ({family.architecture})' for kind, family in FAMILIES.items())}; convert the model "
            "to one of these or choose another model."
        )
    return model_type


def _refuse_unknown(raw: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError at a key that may change the computation."""
    layer_types = raw.get("layer_types") or ["full_attention"]
    slides = "sliding_window" in family.read
    if not slides and (not isinstance(layer_types, list) or any(each != "full_attention" for each in layer_types)):
        raise _unsupported("layer_types", layer_types, "'full_attention' only")
    _check_code(raw.get("auto_map"), family.architecture)
    if raw.get("attention_dropout") and number(raw, "attention_dropout"):
        warnings.warn(
            f"config.json: attention_dropout={raw['attention_dropout']!r} is for training; it is not applied here.",
            stacklevel=4,
        )
    conditional = {**_ALLOWED, **family.allowed}
    for name, value in raw.items():
        if name in family.read:
            continue
        if name in conditional:
            allowed = conditional[name]
            if value is not None and value not in allowed:
                raise _unsupported(name, value, " or ".join(map(repr, allowed)) or "to leave it out")
        elif name not in _READ | _HARMLESS:
            raise ValueError(
                f"config.json: the key {name} (here {value!r}) is not known; it may change what the model computes; "
                "remove it if it does not, or choose a model without it."
            )


def _check_code(auto_map: Any, architecture: str) -> None:
    """Raises ValueError if the model comes with code of its own for another class than transformers has."""
    named = auto_map.items() if isinstance(auto_map, dict) else [("AutoModel", auto_map)]
    models = {str(value).rpartition(".")[2] for key, value in named if str(key).startswith("AutoModel")} - {"None"}
    if models - {architecture, architecture.replace("ForCausalLM", "Model")}:
        raise _unsupported("auto_map", auto_map, f"code for {architecture!r}, which is not run; no other")


def _unsupported(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"config.json: {name}={value!r} is not supported; allowed is {allowed}; choose a model without this feature."
    )
