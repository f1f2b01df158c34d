"""Width scaling in transformers: the exponents of the paper's theory, measured on a small decoder of growing width.

Question:  do A_t Z, B_t, δ₁, δ₂, δ₃ and ΔY of adapters on q and v grow with the width of a decoder as theorem 3.1 says,
           and as in the single layer of experiments.width_scaling, for AdamW and Stable-LoRA?
Command:   python -m experiments.width_transformers       (--help)
Hardware:  2 CPU cores, 4 GB. Minutes: about 3. A step costs n², so width 4096 alone would take more than ten times as
           long as all of these: `--widths 64 256 1024 4096` is for an accelerator.
Expected:  the table's predictions, +- 0.15, but for the disagreement that experiments.width_scaling has too: at c = 3/2
           and with b2 = 0.999, Stable-LoRA's B and ΔY vanish, ΔY with γ = -0.5 to -0.6. The loss falls by 1 % at most
           on average over the seeds: so little is learned that this says nothing of training to the end.

A decoder of two layers, heads of 16 and a feed-forward part as wide as the rest learns two random sequences of eight
tokens. Its frozen weights are random with variance 1/fan-in; those of the output layer 1/n², so that a change of a
projection's outputs of order 1 changes the logits by order 1 at every width. η, s, λ and b2 are those of
experiments.width_scaling, chosen there and not again. Z is what q and v project at that step, and moves as the layer
below learns; δ and ΔY are what the step changes for this Z. Sizes are root mean squares over tokens, entries and both
layers; a pair counts as stable when it is in both. AdamW is Stable-LoRA with λ = 0, all in one program.
"""

import itertools
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import Array

from experiments.cells import append, provenance
from experiments.width_scaling import METHODS, RANK, by_step, constants, section, sizes_of_step
from stable_lora_jax import stability, stable_lora_shrink
from stable_lora_jax.lora import inject_lora, lora_modules
from stable_lora_jax.models import Decoder, DecoderConfig
from stable_lora_jax.training import read_metrics

LAYERS, HEAD, VOCABULARY, BATCH, LENGTH = 2, 16, 16, 2, 8
MODULES = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """Train adapters on decoders of many widths, and fit exponents."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """n, multiples of 16."""
    exponents: tuple[float, ...] = (0.5, 1.0, 1.5)
    """c, in η ∝ n^(-c) and s ∝ n^(2c-1)."""
    seeds: int = 5
    """Decoders, sequences and starts."""
    steps: int = 300
    """The tables and figures show the last; some before are recorded too."""
    lam: float = 0.05
    """λ of Stable-LoRA."""
    results: Path = Path("experiments/results")
    """Folder of the lines, tables and figures."""
    smoke: bool = False
    """Two narrow widths, four steps."""


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
    model = inject_lora(Decoder(config, rngs=rngs, unroll=LAYERS), RANK, RANK, "qv", rngs=rngs)
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


def measure(config: TransformersConfig, width: int, seed: int) -> list[dict[str, Any]]:
    """Returns a line for every c and method."""
    points, numbers, ratio = list(itertools.product(config.exponents, METHODS)), [], width / 64
    for c, method in points:
        eta, scale = constants(c, config.steps)
        lam = 0.0 if method == "adamw" else config.lam
        numbers.append((eta * ratio**-c, scale * ratio ** (2 * c - 1), lam, METHODS[method]))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), width), seed)
    columns = map(jnp.float32, zip(*numbers, strict=True))
    losses, sizes, stable = jax.device_get(trained(width, config.steps, key, *columns))
    lines = []
    for k, (c, method) in enumerate(points):
        when = np.where(stable[k].any(0) & (method != "adamw"), stable[k].argmax(0) + 1, 0)
        line = {"c": c, "method": method, "width": width, "seed": seed}
        line |= {"losses": [round(float(losses[k, step]), 4) for step in (0, -1)]}
        line |= {"stable_at": dict(zip(MODULES, when.tolist(), strict=True))}
        lines.append(line | {"sizes": {name: by_step(sizes[k, :, i]) for i, name in enumerate(MODULES)}})
    return lines


def report(results: Path) -> str:
    """Returns the tables of exponents at the last step, one a module, and draws the figures beside the lines."""
    lines, text = read_metrics(results / "width_transformers.jsonl"), ""
    for name in MODULES if lines else ():
        of_module = [line | {field: line[field][name] for field in ("sizes", "stable_at")} for line in lines]
        text += f"**{name}**. {section(of_module, results / f'width_transformers-{name}.png')}"
    if lines:
        start, end = np.transpose([line["losses"] for line in lines])
        text += f"Losses a token: {start.mean():.3f} before; after, of all runs, {end.min():.3f} to {end.max():.3f}.\n"
    return text


def main(config: TransformersConfig) -> None:
    if config.smoke:
        with tempfile.TemporaryDirectory() as folder:
            main(replace(config, smoke=False, widths=(16, 32), seeds=2, steps=4, results=Path(folder)))
        return
    file, made_by = config.results / "width_transformers.jsonl", provenance()
    done = {(line["width"], line["seed"], line["c"], line["method"]) for line in read_metrics(file)}
    for width, seed in itertools.product(config.widths, range(config.seeds)):
        if not {(width, seed, c, method) for c in config.exponents for method in METHODS} <= done:
            for line in measure(config, width, seed):
                if (width, seed, line["c"], line["method"]) not in done:
                    append(file, line | {"lam": config.lam, "steps": config.steps} | made_by)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(TransformersConfig))
