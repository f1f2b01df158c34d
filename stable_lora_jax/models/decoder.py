"""One decoder for all supported families, whose layers are one module with stacked parameters, run by a scan.

Stacking keeps compile time independent of depth and lets one adapter module serve all layers: whatever replaces a
projection (say `layers.self_attn.q_proj`) only has to hold its own state with a leading layer axis. The scan splits
that state by kind: `nnx.Param` is read, everything else (random number counters) is read and written back.

What families differ in is data (`DecoderConfig`). Layers of one model may differ in what they see and in how they
rotate: both are made once for each kind, and every layer picks its own.

Attribute names follow Hugging Face, so a path here is a path there without the layer index. Kernels are (in, out).
Normalisation, rotary embedding, softmax and logits are float32 whatever the computation dtype.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stable_lora_jax.models.attention import Attention, attend, is_cudnn_attention
from stable_lora_jax.models.cache import KVCache
from stable_lora_jax.models.chunked_head import chunked_log_likelihoods
from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.float32_dot import float32_dot
from stable_lora_jax.models.layer import WEIGHT_INIT, AttentionInputs, DecoderLayer, Hidden, Read, rows_at
from stable_lora_jax.models.norms import rms_norm
from stable_lora_jax.models.rope_scaling import LongRopeScaling, RopeScaling
from stable_lora_jax.models.rotary import Rotation, rotation_at
from stable_lora_jax.models.splash import splash_attention


class Placement(NamedTuple):
    """Says where arrays are to live while they are used; a caller may set `Decoder.placement` to one.

    Attributes:
      weights: (path, parameters) -> the same, put together from the devices they are split over. It is given one layer
        ("layers"), or the output layer, right before use, so that no more need be whole at a time.
      rows: activations, split over devices by their first axis.
      row_splits: how many devices that axis is split over.
      local: from a function of arrays (batch, length, heads, width) or (batch, length) to the same, by every device
        with its own rows and heads: what the partitioner cannot split, a kernel, is called so.
    """

    weights: Callable[[str, Any], Any]
    rows: Callable[[Hidden], Hidden]
    row_splits: int = 1
    local: Callable[[Callable[..., Array]], Callable[..., Array]] = lambda function: function


AS_IT_IS = Placement(weights=lambda path, params: params, rows=lambda hidden: hidden)


class Decoder(nnx.Module):
    """A causal language model of any family that `DecoderConfig` describes.

    `layers` is ONE `DecoderLayer` whose every array has a leading axis of `num_layers`; it is run by a scan and not
    meant to be called itself.

    Args:
      config: sizes and switches.
      rngs: stream for the initial parameters.
      dtype: of the computation.
      param_dtype: of the stored parameters.
      remat: recompute each layer in the backward pass instead of storing what its projections and attention give.
      attention: "xla", "cudnn" or "splash", as `choose_attention` says. With a cache, always "xla", and instead of
        "splash" too where that cannot be (see `stable_lora_jax.models.attention`).
      unroll: write the layers out one after the other instead of looping over them. The program takes longer to
        compile, and copies nothing that a layer keeps for the backward pass into a stack. A caller may set it later.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from stable_lora_jax.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
      ...     num_kv_heads=1, head_dim=4, rms_norm_eps=1e-5, max_positions=32,
      ... )
      >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
      >>> decoder(jnp.array([[1, 2, 3]])).shape
      (1, 3, 11)
      >>> decoder.layers.self_attn.q_proj.kernel.shape
      (2, 8, 8)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        attention: Attention = "xla",
        unroll: bool = False,
    ):
        self.config, self.dtype, self.remat, self.unroll = config, dtype, remat, unroll
        self.attention: Attention = attention
        self.placement = AS_IT_IS
        width = config.hidden_size

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        # The embedding keeps param_dtype: only the rows that are looked up are converted, not the whole table.
        self.embed_tokens = nnx.Embed(
            config.vocab_size, width, embedding_init=WEIGHT_INIT, rngs=rngs, param_dtype=param_dtype
        )
        self.layers = stacked_layers(rngs)
        self.norm = rms_norm(config, width, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.lm_head = None if config.tie_embeddings else _output_layer(config, dtype, param_dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        documents: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Returns float32 logits of the token after each position; arguments as in `hidden_states`."""
        return self.logits(self.hidden_states(tokens, positions, segments, documents))

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        documents: Int[Array, "batch length"] | None = None,
        read_at: Int[Array, "batch targets"] | None = None,
    ) -> Read:
        """Returns the normalised output of the last layer, (batch, length, width), or where it is read.

        Where the layers are written out, what of the last one comes after attention is computed for those tokens alone.

        Query i sees key j iff j <= i in row order, both are of one document, and (segments[j] == segments[i] or
        segments[j] == 0). So segment 0 is a prefix shared by the branches 1, 2, ... of its document.

        Args:
          tokens: ids in [0, vocab_size).
          positions: rotary positions from 0, anew in each document and without gaps; None counts along the row.
          segments: as above, negative is padding; None: tokens see all before them in their document.
          documents: as above; None: a row is one document.
          read_at: of which tokens of a row the output is wanted, (batch, targets, width); None: of all.

        Raises:
          ValueError: several documents in a row so long that LongRoPE's factors depend on which of them is long.
        """
        length, scaling = tokens.shape[1], self.config.rope_scaling
        if documents is not None and isinstance(scaling, LongRopeScaling) and length > scaling.original_max_positions:
            raise ValueError(
                f"Packed rows of {length} tokens: LongRoPE's factors depend on the length of a row beyond "
                f"{scaling.original_max_positions} tokens. Take rows of at most that, or do not pack."
            )
        if positions is None:
            positions = jnp.arange(length)[None]
        visible, causal = None, jnp.tril(jnp.ones((length, length), bool))[None]
        if documents is not None:
            visible = causal & (documents[:, None, :] == documents[:, :, None])
        if segments is not None:
            keys = segments[:, None, :]
            ours = (keys == segments[:, :, None]) | (keys == 0)
            visible = ours & (causal if visible is None else visible)
        splash = self.attention == "splash" and segments is None
        # In a loop the last layer would need a copy of the others' weights, and a compilation of its own.
        inside = read_at if self.unroll and read_at is not None and read_at.shape[1] < length else None
        hidden, _ = self._run(tokens, positions, visible, causal, positions, None, documents, inside, splash=splash)
        return hidden if read_at is None or inside is not None else rows_at(hidden, read_at)

    def extend(
        self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"], cache: KVCache
    ) -> tuple[Hidden, KVCache]:
        """Returns the normalised output for `tokens` appended to what `cache` holds, and the cache with them.

        A token is stored in the slot of its position and sees every slot up to there. So rows may have different
        lengths: what padding on the right leaves in later slots is overwritten before any token can see it.

        Args:
          tokens: ids in [0, vocab_size).
          positions: of the tokens, in [0, slots); each row's continues where its last real token ended.
          cache: from `init_cache` or an earlier call.
        """
        slots = jnp.arange(cache.keys.shape[2])[None]
        visible = slots[:, None, :] <= positions[:, :, None]
        hidden, cache_out = self._run(tokens, positions, visible, visible, slots, cache)
        assert cache_out is not None  # for the type checker: a cache that goes in comes out
        return hidden, cache_out

    def log_likelihoods(
        self, hidden: Float[Array, "rows targets width"], targets: Int[Array, "rows targets"]
    ) -> Float[Array, "rows targets"]:
        """Returns float32 log p of targets, in nats, from the normalised hidden states that they are read from.

        Unless the output layer has an adapter or is quantized, only a chunk of logits is in memory at a time, forward
        and backward.
        """
        if self.lm_head is not None and type(self.lm_head) is not nnx.Linear:
            logits = self.logits(hidden)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1)
        if self.lm_head is None:
            weight = self._embedding()
        else:
            _, params = nnx.split(self.lm_head, nnx.Param)
            weight = self.placement.weights("lm_head", params)["kernel"][...].astype(self.dtype)
        vocab_axis, hidden = 0 if self.lm_head is None else 1, self._at_logits_scale(hidden)
        return chunked_log_likelihoods(hidden, targets, weight, vocab_axis, self.placement.row_splits)

    def untie(self) -> None:
        """Gives a decoder whose embedding is its output layer too an output layer of its own, equal to it."""
        embedding = self.embed_tokens.embedding[...]
        self.lm_head = nnx.data(_output_layer(self.config, self.dtype, embedding.dtype, nnx.Rngs(0)))
        self.lm_head.kernel[...] = embedding.T
        self.config = dataclasses.replace(self.config, tie_embeddings=False)

    def _at_logits_scale(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        return hidden if self.config.logits_scale == 1 else self.config.logits_scale * hidden

    def _embedding(self) -> Float[Array, "vocab width"]:
        embedding = self.placement.weights("embed_tokens.embedding", self.embed_tokens.embedding[...])
        return embedding.astype(self.dtype)

    def logits(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows vocab"]:
        """Returns float32 logits of normalised hidden states, over any leading axes."""
        hidden = self._at_logits_scale(hidden)
        if self.config.tie_embeddings:
            logits = float32_dot(hidden, self._embedding(), (((hidden.ndim - 1,), (1,)), ((), ())))
            return logits if self.lm_head is None else logits + self.lm_head(hidden)
        if self.lm_head is not None:
            graph, params, rest = nnx.split(self.lm_head, nnx.Param, ...)
            head = nnx.merge(graph, self.placement.weights("lm_head", params), rest)
            logits = head(hidden)
            nnx.update(self.lm_head, nnx.state(head, nnx.Not(nnx.Param)))  # a dropout's count
            return logits
        return float32_dot(hidden, self._embedding(), (((hidden.ndim - 1,), (1,)), ((), ())))

    def _run(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "#batch length"],
        visible: Bool[Array, "#batch length keys"] | None,
        explicit: Bool[Array, "#batch length keys"],
        key_positions: Int[Array, "#batch keys"],
        cache: KVCache | None,
        documents: Int[Array, "batch length"] | None = None,
        read_at: Int[Array, "batch targets"] | None = None,
        *,
        splash: bool = False,
    ) -> tuple[Read, KVCache | None]:
        """Runs all layers; `visible` is as in `attend`, `explicit` the same where it is None.

        With `splash` they are what `documents` say, so that a kernel can do without them. With `read_at` the last layer
        gives its output there alone, and so stands apart from the others.
        """
        config = self.config
        layers = range(config.num_layers)
        rotations = _Kinds([_rotary(config, layer) for layer in layers], lambda kind: _rotation(positions, kind))
        seen = explicit if visible is None else visible
        within = positions[:, :, None] - key_positions[:, None, :]
        # A window as long as the row hides nothing.
        window = config.sliding_window if (config.sliding_window or 0) < seen.shape[-1] else None
        windows = [window if config.slides(layer) else None for layer in layers]
        visibles = _Kinds(
            windows,
            lambda window: seen & (within < window) if window else seen,
            alone=lambda window: seen & (within < window) if window else visible,
        )
        # A cache's keys are not the queries' own; and what a kernel has no mask for is written out.
        written_out = cache is not None or self.attention == "splash"
        attend_as = partial(attend, implementation="xla" if written_out else self.attention)
        by_kernel = self.placement.local(partial(splash_attention, window=windows[0]))
        splash = splash and len(set(windows)) == 1
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)

        def step(read_at, carry, xs):
            hidden, cache = carry
            index, params, rest, rotation, sees = xs

            def attended(query, key, value):
                if splash:
                    return by_kernel(query, key, value, *(() if documents is None else (documents,)))
                return attend_as(query, key, value, visibles.at(sees))

            inputs = AttentionInputs(positions, rotations.at(rotation), attended, read_at)
            hidden = self.placement.rows(hidden)
            layer = nnx.merge(graph, self.placement.weights("layers", params), rest)
            carry = layer(hidden, inputs, cache, index)
            return carry, nnx.split(layer, nnx.Param, ...)[2]

        # The backward pass keeps what the projections and attention give, at most: an adapted projection gives one
        # array, not its base's and its adapter's, what is elementwise is cheaper to compute again than to store, and
        # attention's scores grow with the square of the length. Gathered weights are gathered again. A loop keeps the
        # passes apart; written out, the compiler would find the second one superfluous.
        policies = jax.checkpoint_policies
        kept = policies.save_from_both_policies(policies.save_only_these_names("kept"), is_cudnn_attention)
        saved = policies.nothing_saveable if self.remat else kept
        step = partial(jax.checkpoint, prevent_cse=self.unroll, policy=saved)(step)
        hidden = self.placement.rows(self.embed_tokens(tokens).astype(self.dtype))
        if config.embedding_scale != 1:
            hidden = hidden * jnp.asarray(config.embedding_scale, self.dtype)
        xs = (jnp.arange(config.num_layers), params, rest, rotations.of_layer, visibles.of_layer)
        looped = config.num_layers - (read_at is not None)
        first = jax.tree.map(lambda each: each[:looped], xs)
        unroll = max(looped, 1) if self.unroll else 1
        carry, rest = jax.lax.scan(partial(step, None), (hidden, cache), first, unroll=unroll)
        if read_at is not None:
            carry, of_last = step(read_at, carry, jax.tree.map(lambda each: each[-1], xs))
            rest = jax.tree.map(lambda others, last: jnp.concatenate([others, last[None]]), rest, of_last)
        hidden, cache = carry
        nnx.update(self.layers, rest)
        return self.norm(self.placement.rows(hidden)), cache


def _output_layer(config: DecoderConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.hidden_size,
        config.vocab_size,
        use_bias=False,
        kernel_init=WEIGHT_INIT,
        rngs=rngs,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=float32_dot,
    )


class _Kinds:
    """What layers of one kind share, made once for each kind and picked by the layers of a scan.

    Args:
      of_layers: the kind of every layer, hashable.
      make: from a kind to its arrays.
      alone: the same, where there is one kind alone; it may give None.
    """

    def __init__(self, of_layers: Sequence[Any], make: Callable[[Any], Any], alone: Callable[[Any], Any] | None = None):
        kinds = list(dict.fromkeys(of_layers))
        self._alone = len(kinds) == 1
        if self._alone:
            self._made, self.of_layer = (alone or make)(kinds[0]), None
        else:
            self._made = jax.tree.map(lambda *each: jnp.stack(jnp.broadcast_arrays(*each)), *map(make, kinds))
            self.of_layer = jnp.array([kinds.index(kind) for kind in of_layers])

    def at(self, kind: Int[Array, ""] | None) -> Any:
        """Returns the arrays of a layer's kind."""
        return self._made if self._alone else jax.tree.map(lambda stacked: stacked[kind], self._made)


def _rotary(config: DecoderConfig, layer: int) -> tuple[int, float, RopeScaling | None, bool]:
    """Returns width, base and scaling of a layer's rotary embedding, and whether it has one."""
    rotates = config.rotates(layer)
    if config.sliding_rope_theta is not None and config.slides(layer):
        return config.rotated, config.sliding_rope_theta, None, rotates
    return config.rotated, config.rope_theta, config.rope_scaling, rotates


def _rotation(positions: Int[Array, "#batch length"], kind: tuple[int, float, RopeScaling | None, bool]) -> Rotation:
    width, theta, scaling, rotates = kind
    cos, sin = rotation_at(positions, width, theta, scaling)
    return (cos, sin) if rotates else (jnp.ones_like(cos), jnp.zeros_like(sin))
