"""The contenders of `bench_train`: our step, the same mathematics written out bare, and PEFT on torch."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmarks.bench_timing import (
    ANSWER,
    BATCH,
    FROZEN_LAYER_WEIGHTS,
    VOCABULARY,
    answer_batch,
    page_faults,
    peak_gigabytes,
    peft_logits,
    random_rows,
    timed,
)
from experiments.running.provenance import versions


def run(name: str, length: int, dtype: str, steps: int) -> dict[str, Any]:
    """Returns the measurements of one contender."""
    contenders = {"ours": ours, "bare": bare, "peft": peft, "peft-compiled": partial(peft, compiled=True)}
    return contenders[name](length, dtype, steps)


def ours(length: int, dtype: str, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from stable_lora_jax import stable_lora_shrink
    from stable_lora_jax.lora import inject_lora
    from stable_lora_jax.models import load_model
    from stable_lora_jax.training import compile_step, init_state, make_loss, make_mesh, split_model
    from stable_lora_jax.training.sharding import replicated

    width = jnp.dtype(dtype)
    model = inject_lora(load_model("smollm2-135m", dtype=width, param_dtype=width), 8, 16.0, "qv", rngs=nnx.Rngs(0))
    graph, adapters, frozen = split_model(model)
    adamw = optax.adamw(5e-4)
    optimizer = optax.chain(adamw, stable_lora_shrink(0.001))
    tokens, targets = random_rows(length)
    batch = jax.device_put(answer_batch(tokens, targets))
    mesh = make_mesh()
    step = compile_step(graph, make_loss("answer", 1), optimizer, mesh=mesh, frozen=frozen)
    state = jax.device_put(init_state(jax.tree.map(jnp.copy, adapters), optimizer), replicated(mesh))
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, frozen, batch))
    first = time.perf_counter() - start

    def advance() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, frozen, batch))

    before, seconds = page_faults(), timed(advance, steps)
    faults, peak = page_faults() - before, peak_gigabytes()
    updates = [update_seconds(tx, adapters) for tx in (adamw, optimizer)]
    return {
        "seconds": seconds,
        "compile_seconds": round(first - float(np.median(seconds)), 3),
        "peak_gigabytes": round(peak, 3),
        "page_faults": faults / (steps + 1),
        "floor_seconds": round(frozen_flops(length) / product_rate(BATCH * length, width), 4),
        "adamw_update_seconds": updates[0],
        "shrink_seconds": updates[1] - updates[0],
        "shrink_share": (updates[1] - updates[0]) / float(np.median(seconds)),
        "versions": versions("jax", "flax", "optax"),
    }


def update_seconds(optimizer: Any, params: Any) -> float:
    """Returns the median seconds of 300 jitted updates alone, parameters and state donated."""
    import jax
    import jax.numpy as jnp
    import optax

    grads = jax.tree.map(jnp.ones_like, params)
    carry = (jax.tree.map(jnp.copy, params), optimizer.init(params))

    def update(carry: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    update = jax.jit(update, donate_argnums=0)
    seconds = []
    for _ in range(301):
        start = time.perf_counter()
        carry = jax.block_until_ready(update(carry, grads))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def product_rate(rows: int, dtype: Any) -> float:
    """Returns FLOP/s of (rows, 576) @ (576, 1536), the widest product of the model's layers."""
    import jax
    import jax.numpy as jnp

    x, w = jnp.ones((rows, 576), dtype), jnp.ones((576, 1536), dtype) * 0.5
    product = jax.jit(jnp.matmul)
    return rate_of(lambda: product(x, w).block_until_ready(), rows)


def rate_of(product: Callable[[], Any], rows: int) -> float:
    """Returns FLOP/s of a product of (rows, 576) and (576, 1536)."""
    return 2 * rows * 576 * 1536 / float(np.median(timed(product, 60)))


def frozen_flops(length: int) -> int:
    """Returns the FLOPs of a step in frozen weights: forward, and backward to the activations."""
    return 4 * FROZEN_LAYER_WEIGHTS * BATCH * length + 4 * 576 * VOCABULARY * BATCH * ANSWER


def bare(length: int, dtype: str, steps: int) -> dict[str, Any]:
    """The step that somebody in a hurry would write: one scan, arrays in dicts, AdamW."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from stable_lora_jax.models import load_model

    width = jnp.dtype(dtype)
    model = load_model("smollm2-135m", dtype=width, param_dtype=width)
    layers = model.layers
    projections = {name: getattr(layers.self_attn, f"{name}_proj").kernel[...] for name in "qkvo"}
    projections |= {name: getattr(layers.mlp, f"{name}_proj").kernel[...] for name in ("gate", "up", "down")}
    state = nnx.as_pure(nnx.state(model))
    norms = {"1": state.layers.input_layernorm.scale, "2": state.layers.post_attention_layernorm.scale}
    embedding, last_norm = state.embed_tokens.embedding, state.norm.scale
    lora = {f"{name}{side}": jnp.zeros((30, *shape)) for name, m in (("q", 576), ("v", 192)) for side, shape in
            (("a", (576, 8)), ("b", (8, m)))}  # fmt: skip
    lora = {
        name: x + jax.random.normal(jax.random.key(0), x.shape) / 24 * name.endswith("a") for name, x in lora.items()
    }
    angles = jnp.arange(length)[:, None] / 1e5 ** (jnp.arange(32) / 32)
    cos, sin = (f(angles)[None, :, None].astype(width) for f in (jnp.cos, jnp.sin))
    mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -1e9)

    def norm(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)).astype(width) * scale

    def rotate(x):
        x, y = x[..., :32], x[..., 32:]
        return jnp.concatenate([x * cos - y * sin, y * cos + x * sin], -1)

    def loss(lora, frozen, tokens, targets):
        projections, norms, embedding = frozen

        def layer(x, arrays):
            w, s, ab = arrays
            h = norm(x, s["1"])
            q = h @ w["q"] + 2 * (h @ ab["qa"].astype(width)) @ ab["qb"].astype(width)
            v = h @ w["v"] + 2 * (h @ ab["va"].astype(width)) @ ab["vb"].astype(width)
            q, k = rotate(q.reshape(BATCH, length, 9, 64)), rotate((h @ w["k"]).reshape(BATCH, length, 3, 64))
            k, v = jnp.repeat(k, 3, 2), jnp.repeat(v.reshape(BATCH, length, 3, 64), 3, 2)
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / 8 + mask
            weights = jax.nn.softmax(scores, -1).astype(width)
            x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(BATCH, length, 576) @ w["o"]
            h = norm(x, s["2"])
            return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

        x, _ = jax.lax.scan(layer, embedding[tokens], (projections, norms, lora))
        read = norm(x, last_norm)[:, -ANSWER:]
        logits = jnp.einsum("btd,vd->btv", read, embedding, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    optimizer = optax.adamw(5e-4)

    def step(carry, frozen, tokens, targets):
        value, grads = jax.value_and_grad(loss)(carry[0], frozen, tokens, targets)
        updates, state = optimizer.update(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), value

    step = jax.jit(step, donate_argnums=0)
    frozen, (tokens, targets) = (projections, norms, embedding), random_rows(length)
    carry = (lora, optimizer.init(lora))
    start = time.perf_counter()
    carry, _ = jax.block_until_ready(step(carry, frozen, tokens, targets))
    first = time.perf_counter() - start

    def advance() -> None:
        nonlocal carry
        carry, _ = jax.block_until_ready(step(carry, frozen, tokens, targets))

    seconds = timed(advance, steps)
    return {
        "seconds": seconds,
        "compile_seconds": round(first - float(np.median(seconds)), 3),
        "peak_gigabytes": round(peak_gigabytes(), 3),
        "versions": versions("jax", "optax"),
    }


def peft(length: int, dtype: str, steps: int, compiled: bool = False) -> dict[str, Any]:
    """Hugging Face transformers, PEFT and torch.optim.AdamW, with loss at the same answer tokens.

    On all cores, with torch's fused attention, over plain Linear layers of the dtype under test.

    Raises:
      RuntimeError: a frozen layer is none, or of another dtype.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from stable_lora_jax.data import smollm2_gguf

    file = smollm2_gguf()
    width = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    torch.set_num_threads(os.cpu_count() or 1)
    base = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=width, attn_implementation="sdpa"
    )
    layers = [getattr(part, f"{name}_proj") for layer in base.model.layers for part, names in
              ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))) for name in names]  # fmt: skip
    odd = {f"{type(layer)} of {layer.weight.dtype}" for layer in layers if type(layer) is not torch.nn.Linear}
    odd |= {f"{layer.weight.dtype}" for layer in layers if layer.weight.dtype != width}
    if odd:
        raise RuntimeError(f"The peer is not what a user would train: {odd} instead of torch.nn.Linear of {width}.")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    tokens, targets = (torch.as_tensor(x) for x in random_rows(length))

    def loss() -> Any:
        return torch.nn.functional.cross_entropy(peft_logits(model, tokens, ANSWER), targets.flatten())

    if compiled:
        loss = torch.compile(loss)

    def advance() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    start = time.perf_counter()
    advance()
    first = time.perf_counter() - start
    seconds, peak = timed(advance, steps), peak_gigabytes()
    x, w = torch.ones(BATCH * length, 576, dtype=width), torch.ones(1536, 576, dtype=width)
    rate = rate_of(lambda: torch.nn.functional.linear(x, w), BATCH * length)
    return {
        "seconds": seconds,
        "first_step_seconds": round(first, 3),
        "peak_gigabytes": round(peak, 3),
        "threads": torch.get_num_threads(),
        "floor_seconds": round(frozen_flops(length) / rate, 4),
        "versions": versions("torch", "transformers", "peft"),
    }
