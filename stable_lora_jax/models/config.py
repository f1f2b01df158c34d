"""The shape of a decoder, as one frozen record."""

from dataclasses import dataclass
from typing import Any


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
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "rms_norm_eps",
            "max_positions",
            "rope_theta",
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


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(
                f"{type(config).__name__}: {name}={value}; it must be positive; correct the value in the configuration."
            )
