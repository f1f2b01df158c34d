"""What a file format has to offer so that a decoder can be filled from it, one tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from stable_lora_jax.models.config import DecoderConfig

Part: TypeAlias = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened model file: everything but the weights, and a way to read those.

    Args:
      config: of the decoder the tensors belong to.
      shapes: shape of every tensor, as stored: a linear layer is (out, in).
      tensor_name: the stored name of a parameter, from its path in `Decoder` ("layers.mlp.up_proj.kernel") and
        its layer (None outside the stack).
      read: a part of the tensor of a stored name, by a slice for each axis of its stored shape (none: all of it);
        floating, with Hugging Face's order of the rows of query and key projections.
    """

    config: DecoderConfig
    shapes: Mapping[str, tuple[int, ...]]
    tensor_name: Callable[[str, int | None], str]
    read: Callable[[str, Part], np.ndarray]
