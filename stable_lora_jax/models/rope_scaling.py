"""How published models stretch their rotary embedding beyond the length they were pretrained on, one record a kind.

A model extended by "dynamic" stretches only rows longer than its configured positions, which no row here is: it is the
plain embedding, and has no record.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Rotary frequencies stretched as in Llama 3.1.

    Wavelengths (in positions) below `original_max_positions / high_freq_factor` are kept, those above
    `original_max_positions / low_freq_factor` are multiplied by `factor`, those between are interpolated.

    Raises:
      ValueError: a number is not positive, or the factors are not in order.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"Llama3RopeScaling: low_freq_factor={self.low_freq_factor} and "
                f"high_freq_factor={self.high_freq_factor}; low must be below high; swap or correct them."
            )


@dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """All wavelengths multiplied by `factor`: position interpolation, arXiv 2306.15595.

    Raises:
      ValueError: the factor is not positive.
    """

    factor: float

    def __post_init__(self):
        require_positive(self, "factor")


@dataclass(frozen=True, kw_only=True)
class YarnRopeScaling:
    """Wavelengths interpolated by parts, and larger scores: YaRN, arXiv 2309.00071, section 3.

    Wavelengths that turn more than `beta_fast` times within `original_max_positions` are kept, those that turn less
    than `beta_slow` times are multiplied by `factor`, with a ramp over the features between.

    Attributes:
      attention_factor: of cosines and sines, so that scores grow by its square.
      truncate: begin and end the ramp at whole features.

    Raises:
      ValueError: a number is not positive.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        require_positive(self, "factor", "original_max_positions", "attention_factor", "beta_fast", "beta_slow")


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A factor for every wavelength, of two sets: LongRoPE, arXiv 2402.13753.

    Attributes:
      short_factor: of rows of up to `original_max_positions` tokens, one per pair of features.
      long_factor: of longer rows.
      attention_factor: of cosines and sines, in all rows.

    Raises:
      ValueError: a number is not positive, or the sets differ in length.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float

    def __post_init__(self):
        require_positive(self, "original_max_positions", "attention_factor")
        if len(self.short_factor) != len(self.long_factor) or min(*self.short_factor, *self.long_factor) <= 0:
            raise ValueError(
                f"LongRopeScaling: {len(self.short_factor)} short and {len(self.long_factor)} long factors; there must "
                "be as many, all positive; take the configuration of the weights."
            )


RopeScaling: TypeAlias = Llama3RopeScaling | LinearRopeScaling | YarnRopeScaling | LongRopeScaling


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError for the first of a record's numbers that is not positive."""
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(
                f"{type(config).__name__}: {name}={value}; it must be positive; correct the value in the configuration."
            )
