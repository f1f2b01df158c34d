"""Small decoder: rules without λ, fixed λ, other starts and decay, over a grid of rates.

Question:  with few data and with fresh data, at s = 2 and at s = 16, which ways to make A small are better than AdamW
           at its own best rate, and is one rule without λ better than every fixed λ and than A₀ × 1/4 in all four?
Command:   python -m experiments.studies.small_decoder
           and, for the way whose best rate was the lowest, --scales 16 --rates 5e-4 1e-3 --variants 'A₀ = 0, B₀ random'
Hardware:  2 CPU cores, 2 GB. Minutes: 100; 13 with --scales 16 --seeds 1.
Expected:  (2026-11-27, 2026-11-29) in LOG.md.

A decoder of three layers of width 64 over bytes is pretrained on Social IQA's questions and answers, and adapted by
LoRA (r = 8 on q and v) to ARC-Easy's: 200 steps of 8 windows of 64 bytes, from 256 windows (few: 6 passes) or from
all, each once (fresh). AdamW with b2 = 0.999, cosine after 3 % warm-up, clip 1. Scored on windows of ARC-Easy's test
split: rate and, where one stops early, step are chosen on one half of them, and the other half is reported.

Two rules are tried. "horizon" closes the expected gap evenly until the last step; the pilot on a real model refuted it
at s = 16. "drift" knows s: it removes of A, in each step, a quarter of s √r times the root mean square of what B moves
by, which is about how far the step moves a unit output; so it is large where rates are too high.

Two ways change A's size without shrinking it. "A₀ = 0, B₀ random" (of variance 1/r) has the other half random (Hayou et
al., arXiv 2406.08447). "‖A‖ kept" scales A back to the norm of its start after each step: the idea of normalising A, as
NoRA does (arXiv 2608.31036), but not that paper's algorithm.
"""

import dataclasses
import functools
import hashlib
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import Array

from experiments.running.cells import append, lines_sharing
from experiments.running.provenance import provenance
from experiments.studies.small_decoder_tables import report
from stable_lora_jax import stable_lora_shrink
from stable_lora_jax.data import load_task
from stable_lora_jax.lora import inject_lora
from stable_lora_jax.models import Decoder, DecoderConfig

RANK, WINDOW, BATCH, FEW, HELD_OUT = 8, 64, 8, 256, 64
MODULES = ("q_proj", "v_proj")
RATES = {16.0: (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), 2.0: (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)}


@dataclass(frozen=True, kw_only=True)
class SmallDecoderConfig:
    """Train every way at every rate, setting, scale and seed."""

    results: Path = Path("experiments/results")
    """Folder of the lines, tables and figures."""
    settings: tuple[str, ...] = ("few", "fresh")
    """few (256 windows, 6 passes), fresh (each once)."""
    scales: tuple[float, ...] = (16.0, 2.0)
    """s."""
    rates: tuple[float, ...] = ()
    """η; six in powers of two if none is given, from 0.002 at s = 16 and from 0.004 at s = 2."""
    seeds: int = 4
    """Seeds 0, 1, ...: of A₀ and of the batches."""
    steps: int = 200
    """Steps of a run."""
    pretraining: int = 3000
    """Steps of the base."""
    variants: tuple[str, ...] = ()
    """Ways, as the tables call them; all if none is given."""
    smoke: bool = False
    """Try everything in seconds, and keep nothing."""


@dataclass(frozen=True)
class Way:
    """What a way changes of AdamW.

    Attributes:
      lam: λ.
      a_scale: A₀'s factor.
      decay: of A, per step at the peak.
      rate_b: B's factor of η.
      b_scale: B₀'s factor of a random matrix of variance 1/r.
      rule: what scales A after a step: horizon, drift, keep (its norm) or nothing.
    """

    lam: float = 0.0
    a_scale: float = 1.0
    decay: float = 0.0
    rate_b: float = 1.0
    b_scale: float = 0.0
    rule: str = ""


def ways(scale: float) -> Mapping[str, Way]:
    """Returns the ways by name; a start that knows s depends on it."""
    return {
        "AdamW": Way(),
        "λ = 0.002": Way(lam=0.002),
        "λ = 0.005": Way(lam=0.005),
        "λ = 0.02": Way(lam=0.02),
        "A₀ × 1/4": Way(a_scale=0.25),
        "A₀ × 1/16": Way(a_scale=1 / 16),
        "A₀ × s^(-1/2)": Way(a_scale=scale**-0.5),
        "decay on A, 0.002 per step": Way(decay=0.002),
        "η of B × 1/4": Way(rate_b=0.25),
        "rule: horizon": Way(rule="horizon"),
        "rule: drift": Way(rule="drift"),
        "A₀ = 0, B₀ random": Way(a_scale=0.0, b_scale=1.0),
        "‖A‖ kept": Way(rule="keep"),
    }


def windows(task: str, split: str) -> np.ndarray:
    """Returns the questions with their right answers as bytes: (windows, WINDOW + 1)."""
    text = "".join(f"{q.question} {q.choices[q.answer_index]}\n" for q in load_task(task, split)).encode()
    whole = len(text) // (WINDOW + 1) * (WINDOW + 1)
    return np.frombuffer(text[:whole], np.uint8).reshape(-1, WINDOW + 1).astype(np.int32)


def batches(count: int, steps: int, seed: int) -> np.ndarray:
    """Returns indices (steps, BATCH) into windows: pass after pass, each in an order of its own."""
    rng, needed = np.random.default_rng(seed), steps * BATCH
    order = np.concatenate([rng.permutation(count) for _ in range(-(-needed // count))])
    return order[:needed].reshape(steps, BATCH)


def losses(model: Decoder, rows: Array) -> Array:
    """Returns nats per byte of every window."""
    return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean(-1)


def untrained() -> Decoder:
    """Returns a decoder of 160,000 weights."""
    config = DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_positions=WINDOW,
    )
    return Decoder(config, rngs=nnx.Rngs(0), unroll=True)


def pretrained(steps: int) -> Decoder:
    """Returns the base, trained on Social IQA."""
    graph, params = nnx.split(untrained())
    rows = jnp.asarray(windows("social_iqa", "train"))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 20, steps))

    def step(carry: Any, index: Array) -> Any:
        params, state = carry
        gradients = jax.grad(lambda p: losses(nnx.merge(graph, p), rows[index]).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    order = jnp.asarray(batches(len(rows), steps, 0))
    (params, _), _ = jax.jit(functools.partial(jax.lax.scan, step))((params, optimizer.init(params)), order)
    return nnx.merge(graph, params)


def base_in(folder: Path, steps: int) -> tuple[Decoder, str]:
    """Returns the base that the lines of a folder share, and a checksum of its weights; trains and keeps it if need be.

    Thousands of steps amplify rounding errors: another machine or JAX trains another base, and bases differ by 0.01
    nats per byte, as much as the ways do.
    """
    file = folder / f"small_decoder-base-{steps}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree.leaves(nnx.split(pretrained(steps))[1])
        partial = file.with_name(f"partial-{file.name}")  # a kill leaves no half file
        np.savez(partial, *map(np.asarray, leaves))
        partial.replace(file)
    graph, params = nnx.split(untrained())
    stored = np.load(file)
    leaves = [stored[name] for name in stored.files]
    checksum = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:12]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(params), map(jnp.asarray, leaves))), checksum


def shrinks(rule: str, scale: float, step: Array, steps: int, gap: Array, moved: Array) -> Array:
    """Returns the factor of each matrix A (layers, n, r) in a rule's step, before its stop.

    Args:
      rule: horizon or drift.
      scale: s.
      step, steps: steps done, and in all.
      gap: of each layer's pair at the step's start.
      moved: what B moves by, (layers, r, m).
    """
    if rule == "drift":
        size = jnp.sqrt(jnp.mean(moved**2, axis=(1, 2)))
        return 1 - jnp.minimum(0.1, scale * math.sqrt(RANK) * size / 4)
    expected = jnp.log(gap) - jnp.log(jnp.maximum(1.0, steps / jnp.maximum(step, 1)))
    return jnp.exp(-jnp.maximum(0.0, expected) / jnp.maximum(1, steps - step))


def norms(stack: Array) -> Array:
    """Returns the Frobenius norm of each layer's matrix."""
    return jnp.sqrt(jnp.sum(stack**2, axis=(1, 2)))


def gap(a: Array, b: Array) -> Array:
    """Returns (‖A‖/n)/(‖B‖/m) of each layer; infinite while B is 0."""
    return (norms(a) / a.shape[1]) / (norms(b) / b.shape[2])


def runner(config: SmallDecoderConfig, base: Decoder, setting: str, scale: float, rule: str) -> Any:
    """Returns the compiled runs of rates and all seeds: (rates, the numbers of a `Way` in order) -> nats per byte.

    The nats are (rates, seeds, marks, halves): at ten steps, on the two halves of the held-out windows.
    """
    rows = windows("arc_easy", "train")
    rows = jnp.asarray(rows[np.random.default_rng(0).permutation(len(rows))[:FEW]] if setting == "few" else rows)
    held_out = windows("arc_easy", "test")
    held_out = jnp.asarray(held_out[np.random.default_rng(1).permutation(len(held_out))[: 2 * HELD_OUT]])
    every = config.steps // 10
    of_base, weights = nnx.split(base)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.steps * 3 // 100, config.steps)

    def start(key: Array) -> Any:
        model = inject_lora(nnx.merge(of_base, weights), RANK, RANK * scale, "qv", rngs=nnx.Rngs(key))
        return nnx.split(model, nnx.LoRAParam, ...)

    graph = jax.eval_shape(start, jax.random.key(0))[0]

    def run(way: Way, rate: Array, key: Array, order: Array) -> Array:
        adapters, frozen = (nnx.as_pure(part) for part in start(key)[1:])
        for number, name in enumerate(MODULES):
            of = adapters["layers"]["self_attn"][name]
            drawn = jax.random.normal(jax.random.fold_in(key, number), of["lora_b"].shape)
            of["lora_a"] *= way.a_scale
            of["lora_b"] += way.b_scale * RANK**-0.5 * drawn
        adam = optax.adam(lambda count: rate * shape(count))
        optimizer: Any = optax.chain(optax.clip_by_global_norm(1.0), adam)
        shrink = stable_lora_shrink(way.lam, stack_axes="leading")

        def loss(adapters: Any, rows: Array) -> Array:
            return losses(nnx.merge(graph, adapters, frozen), rows)

        def step(carry: Any, index: Array) -> Any:
            adapters, state, of_shrink, stable, count = carry
            gradients = jax.grad(lambda p: loss(p, rows[index]).mean())(adapters)
            updates, state = optimizer.update(gradients, state, adapters)
            for name in MODULES:
                of, moved = (tree["layers"]["self_attn"][name] for tree in (adapters, updates))
                moved["lora_b"] *= way.rate_b
                moved["lora_a"] -= way.decay * shape(count) * of["lora_a"]
                if rule == "keep":
                    new = of["lora_a"] + moved["lora_a"]
                    moved["lora_a"] = (norms(of["lora_a"]) / norms(new))[:, None, None] * new - of["lora_a"]
                elif rule:
                    of_pair = gap(of["lora_a"], of["lora_b"])
                    stable[name] |= of_pair < 1
                    factor = shrinks(rule, scale, count, config.steps, of_pair, moved["lora_b"])
                    factor = jnp.where(stable[name] | jnp.isinf(of_pair), 1.0, factor)[:, None, None]
                    moved["lora_a"] = factor * (of["lora_a"] + moved["lora_a"]) - of["lora_a"]
            updates, of_shrink = shrink.update(updates, of_shrink, adapters)
            return (optax.apply_updates(adapters, updates), state, of_shrink, stable, count + 1), None

        def stretch(carry: Any, order: Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, order)
            return carry, loss(carry[0], held_out).reshape(2, HELD_OUT).mean(-1)

        stable = {name: jnp.zeros(3, bool) for name in MODULES}
        carry = (adapters, optimizer.init(adapters), shrink.init(adapters), stable, jnp.zeros((), jnp.int32))
        return jax.lax.scan(stretch, carry, order.reshape(10, every, BATCH))[1]

    orders = jnp.asarray(np.stack([batches(len(rows), 10 * every, seed) for seed in range(config.seeds)]))
    keys = jnp.stack([jax.random.key(seed) for seed in range(config.seeds)])

    @jax.jit
    def all_of_them(rates: Array, *numbers: Any) -> Array:
        of_seeds = jax.vmap(functools.partial(run, Way(*numbers)), in_axes=(None, 0, 0))
        return jax.vmap(of_seeds, in_axes=(0, None, None))(rates, keys, orders)

    return all_of_them


def main(config: SmallDecoderConfig) -> None:
    if config.smoke:
        with tempfile.TemporaryDirectory() as folder:
            small = {"results": Path(folder), "settings": ("few",), "scales": (2.0,), "rates": (1e-3,), "seeds": 2}
            chosen = ("AdamW", "λ = 0.02", "rule: drift", "A₀ = 0, B₀ random", "‖A‖ kept")
            return main(dataclasses.replace(config, **small, variants=chosen, steps=10, pretraining=2, smoke=False))
    if unknown := [scale for scale in config.scales if not config.rates and scale not in RATES]:
        raise ValueError(f"There are grids of rates for s of {[*RATES]}, not of {unknown}. Give rates: --rates.")
    file = config.results / "small_decoder.jsonl"
    same: dict[str, Any] = {name: getattr(config, name) for name in ("steps", "pretraining", "seeds")}
    lines_sharing(file, same)
    base, same["base"] = base_in(config.results, config.pretraining)
    lines = lines_sharing(file, same)
    known = {(line["setting"], line["scale"], line["way"], rate) for line in lines for rate in line["rates"]}
    for setting in config.settings:
        for scale in config.scales:
            compiled: dict[str, Any] = {}
            for name, way in ways(scale).items():
                grid = config.rates or RATES[scale]
                rates = [rate for rate in grid if (setting, scale, name, rate) not in known]
                if not rates or name not in (config.variants or ways(scale)):
                    continue
                begun = time.perf_counter()
                if way.rule not in compiled:
                    compiled[way.rule] = runner(config, base, setting, scale, way.rule)
                *numbers, _ = dataclasses.astuple(way)
                found = np.round(np.asarray(compiled[way.rule](jnp.array(rates), *numbers), float), 5).tolist()
                told = {"setting": setting, "scale": scale, "way": name, "rates": rates, "nats": found}
                seconds = round(time.perf_counter() - begun, 1)
                append(file, told | same | {"seconds": seconds} | provenance())
                print(setting, scale, name, f"{seconds} s", flush=True)
    print(report(config.results))


if __name__ == "__main__":
    main(tyro.cli(SmallDecoderConfig))
