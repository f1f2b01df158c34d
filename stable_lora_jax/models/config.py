"""What distinguishes one decoder from another, as one frozen record: sizes, and everything that families differ in."""

from dataclasses import dataclass
from typing import Literal

from stable_lora_jax.models.rope_scaling import LongRopeScaling, RopeScaling, require_positive


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a decoder; widths are in features, positions in tokens. The defaults are Llama's.

    Attributes:
      model_type: Hugging Face's name of the family, which says how config.json is written; the decoder ignores it.
      rope_scaling: how the rotary embedding is stretched; None: it is not.
      rotary_dim: the first features of a head, which are rotated; None: all.
      rope_layers: per layer, whether it rotates; empty: all do.
      sliding_window: tokens that a query of a sliding layer sees, itself included; None: no layer slides.
      sliding_layers: per layer, whether it slides; empty: all do, if there is a window.
      sliding_rope_theta: base of the rotary embedding in sliding layers, not stretched; None: that of the others.
      qkv_bias, o_bias, mlp_bias: biases of these projections.
      qk_norm: RMS norm of queries and keys before they are rotated: of each "head", or of the whole "projection".
      norms: where a layer normalises: what goes into attention and feed-forward part ("pre"), what comes out of them
        ("post"), or both.
      norm_offset: added to the stored scale of every norm.
      activation: of the gate.
      embedding_scale: factor of the embeddings.
      residual_scale: factor of what attention and feed-forward part add.
      attention_scale: factor of the scores; None: head_dim ** -0.5.
      logits_scale: factor of the logits.

    Raises:
      ValueError: a size is not positive, the heads cannot be grouped, a head's rotated width is odd, or a list is not
        one per layer.
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
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False
    model_type: str = "llama"
    rotary_dim: int | None = None
    rope_layers: tuple[bool, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    sliding_rope_theta: float | None = None
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "projection"] = ""
    norms: Literal["pre", "post", "both"] = "pre"
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logits_scale: float = 1.0

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        require_positive(self, *sizes, "head_dim", "rms_norm_eps", "max_positions", "rope_theta")
        optional = ("rotary_dim", "sliding_window", "sliding_rope_theta", "attention_scale")
        require_positive(self, *(name for name in optional if getattr(self, name) is not None))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}; every key-value head "
                "serves the same number of query heads; choose a num_kv_heads that divides num_heads."
            )
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ValueError(
                f"DecoderConfig: head_dim={self.head_dim}, rotary_dim={self.rotary_dim}; rotary embedding turns pairs "
                "of a head's features, so the rotated width must be even and no larger than the head's; correct it."
            )
        for name in ("rope_layers", "sliding_layers"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise ValueError(
                    f"DecoderConfig: {name} has {len(getattr(self, name))} entries for {self.num_layers} layers; give "
                    "one per layer, or none."
                )
        if isinstance(self.rope_scaling, LongRopeScaling) and 2 * len(self.rope_scaling.long_factor) != self.rotated:
            raise ValueError(
                f"DecoderConfig: {len(self.rope_scaling.long_factor)} factors of wavelengths for {self.rotated} "
                "rotated features; one per pair is needed; take the configuration of the weights."
            )

    @property
    def rotated(self) -> int:
        """Features of a head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def slides(self, layer: int) -> bool:
        """Returns whether a layer's queries see a window alone."""
        return self.sliding_window is not None and (not self.sliding_layers or self.sliding_layers[layer])

    def rotates(self, layer: int) -> bool:
        """Returns whether a layer rotates its queries and keys."""
        return not self.rope_layers or self.rope_layers[layer]
