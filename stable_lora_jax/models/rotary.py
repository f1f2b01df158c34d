"""Rotary position embedding: each pair (x_i, x_{i+H/2}) of a head is turned by position * frequency_i.

Deviation from the reference code: the frequencies are computed in float64 and rounded once to float32, so an angle
may differ from transformers' in its last bits (about 5e-4 rad at position 8192).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stable_lora_jax.models.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

Rotation = tuple[Float[Array, "#batch length 1 half"], Float[Array, "#batch length 1 half"]]


def rotary_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns the width / 2 rotary frequencies in radians per position, float32; of LongRoPE those of short rows.

    f_i = theta^(-2i / width). Llama 3 multiplies f_i by s_i + (1 - s_i) / factor, where s_i is 1 for short
    wavelengths 2 pi / f_i, 0 for long ones, and linear in 1 / wavelength between; YaRN does with an s_i that is linear
    in i. Linear scaling divides all by the factor, LongRoPE each by its own.

    Args:
      width: rotated features of a head, even.
      theta: base of the geometric series.
      scaling: how it is stretched, or None.

    Reference:
        RoFormer, arXiv 2104.09864, eq. 15; The Llama 3 Herd of Models, arXiv 2407.21783, section 3.4.2; YaRN, arXiv
        2309.00071, section 3.2.
    """
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    match scaling:
        case Llama3RopeScaling():
            turns = scaling.original_max_positions * frequencies / (2 * np.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
        case YarnRopeScaling():
            kept = 1 - _ramp(width, theta, scaling)
            frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
        case LinearRopeScaling():
            frequencies = frequencies / scaling.factor
        case LongRopeScaling():
            frequencies = frequencies / np.array(scaling.short_factor)
    return frequencies.astype(np.float32)


def _ramp(width: int, theta: float, scaling: YarnRopeScaling) -> np.ndarray:
    """Returns 0 for the pairs of features that YaRN keeps, 1 for those it stretches fully, and a ramp between."""

    def pair_that_turns(times: float) -> float:
        turned = scaling.original_max_positions / (times * 2 * math.pi)
        return width * math.log(turned) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)


def rotation_at(
    positions: Int[Array, "#batch length"], width: int, theta: float, scaling: RopeScaling | None
) -> Rotation:
    """Returns cosine and sine (float32) of every angle, to broadcast over heads; arguments as of `rotary_frequencies`.

    LongRoPE takes its long factors for the rows that hold a position beyond the original ones.
    """
    where = positions.astype(jnp.float32)[:, :, None, None]
    angles = where * rotary_frequencies(width, theta, scaling)
    if isinstance(scaling, LongRopeScaling):
        long = rotary_frequencies(width, theta, None).astype(np.float64) / np.array(scaling.long_factor)
        is_long = positions.max(axis=1)[:, None, None, None] >= scaling.original_max_positions
        angles = jnp.where(is_long, where * long.astype(np.float32), angles)
    size = scaling.attention_factor if isinstance(scaling, YarnRopeScaling | LongRopeScaling) else 1.0
    return size * jnp.cos(angles), size * jnp.sin(angles)


def rotate(heads: Float[Array, "batch length heads width"], rotation: Rotation) -> Float[Array, "..."]:
    """Returns the heads turned by `rotation`, computed in float32, in the dtype of `heads`.

    Features beyond those that the rotation is of stay as they are.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    values = heads.astype(jnp.float32)
    first, second, rest = jnp.split(values, [half, 2 * half], axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(heads.dtype)
