"""The shape of a decoder, as one frozen record, and how to read it from a Hugging Face config.json.

A feature this package cannot compute is refused here, by name, so that no model loads and then answers wrongly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")  # the second has a bias on q, k and v


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Rotary frequencies stretched as in Llama 3.1.

    Wavelengths (in positions) below `original_max_positions / high_freq_factor` are kept, those above
    `original_max_positions / low_freq_factor` are multiplied by `factor`, those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        _require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"Llama3RopeScaling: low_freq_factor={self.low_freq_factor} and "
                f"high_freq_factor={self.high_freq_factor}; low must be below high; swap or correct them."
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a Llama or Qwen2 decoder; widths are in features, positions in tokens.

    Raises:
        ValueError: a size is not positive, the heads cannot be grouped, or the head width is odd.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        _require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "rms_norm_eps", "max_positions", "rope_theta"),
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}; every key-value head "
                "serves the same number of query heads; choose a num_kv_heads that divides num_heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig: head_dim={self.head_dim}; rotary embedding turns pairs of features, so it must be "
                "even; choose an even head_dim."
            )


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` of a parsed Hugging Face config.json.

    Rotary settings are read from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    Args:
        raw: the parsed file; `architectures` must name LlamaForCausalLM or Qwen2ForCausalLM.

    Raises:
        ValueError: another architecture, a feature that is not supported, or a key that is missing.
    """
    architectures = list(raw.get("architectures") or [])
    if len(architectures) != 1 or architectures[0] not in _ARCHITECTURES:
        raise ValueError(
            f"config.json: architectures={architectures}; supported are {', '.join(_ARCHITECTURES)}; "
            "convert the model to one of these or choose another model."
        )
    rope = _rope_parameters(raw)
    _refuse_unsupported(raw, rope)
    try:
        num_heads = raw["num_attention_heads"]
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // max(num_heads, 1),
            rms_norm_eps=raw["rms_norm_eps"],
            max_positions=raw["max_position_embeddings"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_llama3_scaling(rope) if rope["rope_type"] == "llama3" else None,
            qkv_bias=architectures[0] == "Qwen2ForCausalLM",
            tie_embeddings=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(
            f"config.json: key {error} is missing; a decoder cannot be built without it; "
            "take the config.json that belongs to the weights."
        ) from None


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """What `config_from_hf` reads: the config.json of a decoder, for transformers too.

    It names no start and end token, of which a decoder knows nothing; left out, transformers would take 1 and 2.
    """
    architecture = _ARCHITECTURES[config.qkv_bias]
    raw = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
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


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10_000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _llama3_scaling(rope: Mapping[str, Any]) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
    )


def _refuse_unsupported(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    # (setting, what came, whether this package computes it, what is allowed)
    rules = (
        ("rope_type", rope["rope_type"], rope["rope_type"] in ("default", "llama3"), "'default' or 'llama3'"),
        *_allow_only(rope, "partial_rotary_factor", 1.0),
        *_allow_only(raw, "hidden_act", "silu"),
        *_allow_only(raw, "mlp_bias", False),
        *_allow_only(raw, "attention_bias", False),
        *_allow_only(raw, "use_sliding_window", False),
        ("layer_types", sorted(layer_types), layer_types == {"full_attention"}, "'full_attention' only"),
    )
    for name, value, supported, allowed in rules:
        if not supported:
            raise ValueError(
                f"config.json: {name}={value!r} is not supported; allowed is {allowed}; "
                "choose a model without this feature."
            )


def _allow_only(settings: Mapping[str, Any], name: str, allowed: Any) -> list[tuple[str, Any, bool, str]]:
    value = settings.get(name, allowed)
    return [(name, value, value == allowed, repr(allowed))]


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(
                f"{type(config).__name__}: {name}={value}; it must be positive; correct the value in the configuration."
            )
