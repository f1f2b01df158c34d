"""Adapters on a small random decoder of any width, trained, and the sizes of their steps (see `theory`).

A decoder of two layers, heads of 16 and a feed-forward part as wide as the rest learns two random sequences of eight
tokens. Its frozen weights are random with variance 1/fan-in; those of the output layer 1/n², so that a change of a
projection's outputs of order 1 changes the logits by order 1 at every width. AdamW is Stable-LoRA with λ = 0, all in
one program.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from experiments.studies.theory import RANK, sizes_of_step
from stable_lora_jax import stability, stable_lora_shrink
from stable_lora_jax.lora import inject_lora, lora_modules
from stable_lora_jax.models import Decoder, DecoderConfig

LAYERS, HEAD, VOCABULARY, BATCH, LENGTH = 2, 16, 16, 2, 8
MODULES = ("q_proj", "v_proj")


class Seen(nnx.Module):
    """A norm that keeps its output; the decoder's loop over the layers hands out whatever is not a parameter."""

    def __init__(self, norm: nnx.Module, shape: tuple[int, ...]):
        self.norm, self.output = norm, nnx.Intermediate(jnp.zeros(shape))

    def __call__(self, x: Array) -> Array:
        """What the norm gives."""
        self.output[...] = self.norm(x)
        return self.output[...]


def random_decoder(width: int, key: Array) -> Decoder:
    """Returns a decoder with fresh adapters of scale 1."""
    rngs = nnx.Rngs(key)
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width,
        num_layers=LAYERS,
        num_heads=width // HEAD,
        num_kv_heads=width // HEAD,
        head_dim=HEAD,
        rms_norm_eps=1e-5,
        max_positions=LENGTH,
    )
    model = inject_lora(Decoder(config, rngs=rngs, unroll=True), RANK, RANK, "qv", rngs=rngs)
    for path, linear in nnx.iter_modules(model):
        if isinstance(linear, nnx.Linear):
            fan_in = linear.kernel.shape[-2]
            size = 1 / fan_in if path == ("lm_head",) else fan_in**-0.5
            linear.kernel[...] = size * jax.random.normal(rngs.params(), linear.kernel.shape)
    model.embed_tokens.embedding[...] = jax.random.normal(rngs.params(), (VOCABULARY, width))
    layers: Any = model.layers
    layers.input_layernorm = Seen(layers.input_layernorm, (LAYERS, BATCH, LENGTH, width))
    return model


@partial(jax.jit, static_argnames=("width", "steps"))
def trained(width: int, steps: int, key: Array, eta: Array, scale: Array, lam: Array, b2: Array) -> Any:
    """Returns losses (points, steps), sizes (points, steps, modules, 6) and flags (points, steps, modules).

    The points, one for each element of η, s, λ and b2, start from the same decoder and learn the same sequences.
    """
    for_model, for_tokens = jax.random.split(key)
    graph, start, frozen = nnx.split(random_decoder(width, for_model), nnx.LoRAParam, ...)
    start, frozen = nnx.as_pure(start), nnx.as_pure(frozen)
    tokens = jax.random.randint(for_tokens, (BATCH, LENGTH + 1), 0, VOCABULARY)

    def loss(adapters: Any, scale: Array) -> tuple[Array, Array]:
        model = nnx.merge(graph, adapters, frozen)
        for module in lora_modules(model).values():
            module.lora_b[...] = scale * module.lora_b[...]
        losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:])
        seen: Any = model.layers.input_layernorm
        return losses.mean(), seen.output[...]

    def of_point(eta: Array, scale: Array, lam: Array, b2: Array) -> Any:
        shrink = stable_lora_shrink(lam, stack_axes="leading")
        optimizer = optax.chain(optax.adam(eta, b2=b2, eps=1e-20), shrink)

        def step(carry: Any, _: None) -> Any:
            adapters, state = carry
            (value, z), gradients = jax.value_and_grad(loss, has_aux=True)(adapters, scale)
            updates, state = optimizer.update(gradients, state, adapters)
            new: Any = optax.apply_updates(adapters, updates)
            z = z.reshape(LAYERS, BATCH * LENGTH, width)
            before, after = (tree["layers"]["self_attn"] for tree in (adapters, new))
            sizes = jnp.stack([sizes_of_step(z, before[name], after[name], scale) for name in MODULES])
            flags = stability(new, state, stack_axes="leading")
            stable = jnp.stack([flags[f"layers/self_attn/{name}/lora"].stable.all() for name in MODULES])
            return (new, state), (value, sizes, stable)

        return jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[1]

    return jax.vmap(of_point)(eta, scale, lam, b2)
