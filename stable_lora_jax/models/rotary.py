"""Rotary position embedding: each pair (x_i, x_{i+H/2}) of a head is turned by position * frequency_i.

Deviation from the reference code: the frequencies are computed in float64 and rounded once to float32, so an angle
may differ from transformers' in its last bits (about 5e-4 rad at position 8192).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stable_lora_jax.models.config import Llama3RopeScaling

Rotation = tuple[Float[Array, "#batch length 1 half"], Float[Array, "#batch length 1 half"]]


def rotary_frequencies(head_dim: int, theta: float, scaling: Llama3RopeScaling | None) -> np.ndarray:
    """The head_dim / 2 rotary frequencies in radians per position, float32.

    f_i = theta^(-2i / head_dim). Llama 3 multiplies f_i by s_i + (1 - s_i) / factor, where s_i is 1 for short
    wavelengths 2 pi / f_i, 0 for long ones, and linear in 1 / wavelength between.

    Args:
        head_dim: width of a head, even.
        theta: base of the geometric series.
        scaling: the Llama 3.1 stretch, or None.

    Reference:
        RoFormer, arXiv 2104.09864, eq. 15; The Llama 3 Herd of Models, arXiv 2407.21783, section 3.4.2.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotation_at(positions: Int[Array, "#batch length"], frequencies: Float[np.ndarray, " half"]) -> Rotation:
    """Cosine and sine (float32) of every angle, shaped to broadcast over heads."""
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: Float[Array, "batch length heads width"], rotation: Rotation) -> Float[Array, "..."]:
    """The heads turned by `rotation`, computed in float32 and returned in the dtype of `heads`."""
    cos, sin = rotation
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)
