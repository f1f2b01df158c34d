"""Adapters on what knows the vocabulary: an embedding, and an output layer that is the embedding transposed.

Where the two share their weight (tied), each adapter acts in its own place alone, as in PEFT: that of the embedding
on what goes in, that of the output layer on the logits. A merged model then needs a weight for each.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stable_lora_jax.lora.layer import LoRALayer


class LoRAEmbed(LoRALayer):
    """y = W[token] + s A[token] B, with A: (vocabulary, r) and B: (r, width); options as in `LoRALayer`.

    The other way round than in a Linear, A starts at zero and B at random, as in PEFT: a token that was never trained
    stays as it is. No dropout acts on tokens.

    Args:
      base: the embedding to adapt.
      rank, alpha, options: as `LoRALayer` takes them.
    """

    def __init__(
        self,
        base: nnx.Embed,
        rank: int,
        alpha: float,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        use_rslora: bool = False,
    ):
        super().__init__(
            base.embedding.shape,
            rank,
            alpha,
            rngs=rngs,
            dtype=dtype,
            use_rslora=use_rslora,
            a_init=nnx.initializers.zeros_init(),
            b_init=nnx.initializers.normal(1.0),
        )
        self.base = base

    @property
    def embedding(self) -> nnx.Param:
        """The frozen embedding, for an output layer that shares it."""
        return self.base.embedding

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """Returns the embedding of each token, in the base layer's output dtype."""
        y = self.base(tokens)
        down = self.lora_a[...][tokens].astype(y.dtype)
        return y + self.scale * down @ self.lora_b[...].astype(y.dtype)

    def attend(self, query: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Returns logits by the frozen embedding, as `nnx.Embed.attend`."""
        return self.base.attend(query)

    def merged(self) -> nnx.Embed:
        """Returns the base layer, changed in place to compute the same; the sum is formed in float32 or wider."""
        embedding = self.base.embedding
        embedding[...] = self.added_to(embedding[...]).astype(embedding.dtype)
        return self.base


class LoRATiedHead(LoRALayer):
    """The part s (x A) B of the logits, with A: (width, r) and B: (r, vocabulary), next to a tied output layer's.

    It has no weight of its own to adapt: the decoder adds it to the logits that its embedding gives. Arguments as
    those of `LoRALayer`, but for the shape, which is the embedding's transposed.
    """

    def __init__(self, embedding: nnx.Embed, rank: int, alpha: float, **options: Any):
        super().__init__(embedding.embedding.shape[::-1], rank, alpha, **options)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Returns the adapter's part of the logits, in float32."""
        x = x if self.dropout is None else self.dropout(x)
        down = x.astype(jnp.float32) @ self.lora_a[...].astype(jnp.float32)
        return self.scale * down @ self.lora_b[...].astype(jnp.float32)


def tied_embedding(model: nnx.Module) -> nnx.Embed | LoRAEmbed | None:
    """Returns the embedding that a model has as its output layer too: `lm_head` is None, or its adapter; else None."""
    if isinstance(getattr(model, "lm_head", model), LoRATiedHead | None):
        return getattr(model, "embed_tokens", None)
    return None
