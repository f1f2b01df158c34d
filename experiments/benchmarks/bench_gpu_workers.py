"""The contenders of `experiments.bench_gpu`, one per process: `python -m [this module] CELL STEPS`."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmarks.bench_timing import peak_gigabytes, peft_logits

WARM = 3
PACKED = 8  # examples in a packed row
TARGETS = {"qv": ["q_proj", "v_proj"]}
TARGETS["qkvogud"] = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
# bfloat16 operations a second, dense, by the published figures of SXM cards.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def config_of(name: str) -> Any:
    """Returns a model's sizes."""
    from stable_lora_jax.models import DecoderConfig
    from stable_lora_jax.models.known_configs import KNOWN_CONFIGS

    if name != "tiny":
        return KNOWN_CONFIGS[name]
    return DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_positions=128,
        tie_embeddings=True,
    )


def model_flops(config: Any, rows: int, length: int, predicted: int) -> float:
    """Returns what a step must do: frozen products forward and back, logits, causal attention three times."""
    c, kv = config, config.num_kv_heads * config.head_dim
    attention = 2 * c.hidden_size * (c.num_heads * c.head_dim + kv)
    layers = c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    scores = 3 * 4 * c.num_layers * c.num_heads * c.head_dim * length / 2
    return rows * (length * (4 * layers + scores) + 4 * predicted * c.vocab_size * c.hidden_size)


def rows_of(cell: dict[str, Any], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = (cell["rows"], cell["length"]), (cell["rows"], cell["predicted"])
    tokens, targets = (rng.integers(0, vocabulary, size) for size in sizes)
    return tokens, targets


def clocked(advance: Callable[[], None], finish: Callable[[], None], steps: int) -> tuple[float, float]:
    """Returns the first call's seconds, and the seconds of each of `steps` calls begun one after the other."""
    start = time.perf_counter()
    advance()
    finish()
    first = time.perf_counter() - start
    for _ in range(WARM):
        advance()
    finish()
    start = time.perf_counter()
    for _ in range(steps):
        advance()
    finish()
    return first, (time.perf_counter() - start) / steps


def told(cell: dict[str, Any], first: float, seconds: float, peak: float, device: str) -> dict[str, Any]:
    peak_flops = next((rate for name, rate in PEAKS.items() if name in device), None)
    flops = model_flops(config_of(cell["model"]), cell["rows"], cell["length"], cell["predicted"])
    return {
        "tokens_per_second": round(cell["rows"] * cell["length"] / seconds, 1),
        "mfu": None if peak_flops is None else round(flops / seconds / peak_flops, 4),
        "peak_gb": round(peak, 3),
        "first_seconds": round(first, 2),
        "seconds": round(seconds, 6),
        "device": device,
    }


def adapted(cell: dict[str, Any], remat: bool = False) -> Any:
    import jax.numpy as jnp
    from flax import nnx

    from stable_lora_jax.lora import inject_lora
    from stable_lora_jax.models import Decoder, choose_attention

    config, width = config_of(cell["model"]), jnp.bfloat16
    attention = choose_attention("auto", dtype=width, head_dim=config.head_dim)
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=width, param_dtype=width, remat=remat, attention=attention)
    rank = cell.get("rank", 8)
    return inject_lora(model, rank, 2.0 * rank, cell.get("targets", "qv"), rngs=nnx.Rngs(1))


def jax_peak() -> tuple[float, str]:
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", 1e9 * peak_gigabytes()) / 1e9, device.device_kind


def ours(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks.bench_timing import answer_batch
    from stable_lora_jax.training import compile_step, init_state, make_loss, make_mesh, make_optimizer, split_model
    from stable_lora_jax.training.sharding import replicated

    graph, adapters, frozen = split_model(adapted(cell, "remat" in cell["contender"]))
    optimizer = make_optimizer("stable-lora", 5e-4, lam=0.001, weight_decay=0.0, clip_norm=1.0)
    mesh = make_mesh()
    batch = answer_batch(*rows_of(cell, config_of(cell["model"]).vocab_size))
    batch = jax.device_put(packed(batch) if "packed" in cell["contender"] else batch)
    unroll = "looped" not in cell["contender"]
    step = compile_step(graph, make_loss("answer", 1), optimizer, mesh=mesh, frozen=frozen, unroll=unroll)
    state = jax.device_put(init_state(jax.tree.map(jnp.copy, adapters), optimizer), replicated(mesh))

    def advance() -> None:
        nonlocal state
        state, _ = step(state, frozen, batch)

    return told(cell, *clocked(advance, lambda: jax.block_until_ready(state), steps), *jax_peak())


def packed(batch: Any) -> Any:
    """Returns rows of as many tokens and targets that hold `PACKED` examples each, of one length."""
    rows, length = batch.tokens.shape
    each, targets = length // PACKED, batch.targets.shape[1] // PACKED
    document = np.arange(length) // each
    read_at = each * np.arange(1, PACKED + 1)[:, None] - np.arange(targets, 0, -1)
    of_row = {
        "positions": np.arange(length) % each,
        "documents": document,
        "read_at": read_at.flatten(),
        "owner": document[read_at.flatten()],
        "answer": np.zeros(PACKED),
    }
    return batch._replace(**{name: np.tile(x.astype(np.int32), (rows, 1)) for name, x in of_row.items()})


def parity(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """The device's attention, forward and back, against float32 written out: rows of one example, and packed rows.

    Raises:
      SystemExit: they differ by more than 2 % of the largest entry.
    """
    import jax
    import jax.numpy as jnp

    from stable_lora_jax.models import choose_attention
    from stable_lora_jax.models.attention import attend

    del steps
    config, rows, length, rng = config_of(cell["model"]), cell["rows"], cell["length"], np.random.default_rng(0)
    chosen = choose_attention("auto", dtype=jnp.bfloat16, head_dim=config.head_dim)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    *inputs, cotangent = (jnp.asarray(rng.normal(size=(rows, length, n, config.head_dim)), jnp.bfloat16) for n in heads)
    document = np.arange(length) * PACKED // length
    visible = np.tril(document[:, None] == document)[None].repeat(rows, 0)

    @partial(jax.jit, static_argnums=0)
    def attended(name: Any, inputs: Any, cotangent: Any, visible: Any) -> Any:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, visible, name), *inputs)
        return out, *back(cotangent)

    differences = {}
    for rows_are, mask in {"whole": None, "packed": jnp.asarray(visible)}.items():
        ours = attended(chosen, inputs, cotangent, mask)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangent))
        with jax.default_matmul_precision("highest"):
            exact = attended("xla", *wide, mask)
        off = [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(ours, exact, strict=True)]
        differences[rows_are] = max(off)
    if not max(differences.values()) <= 2e-2:
        raise SystemExit(f"{chosen} is off by {differences}")
    return {"attention": chosen, "differences": differences, "device": jax.devices()[0].device_kind}


def peft(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from stable_lora_jax.models.hf_config import config_to_hf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw = config_to_hf(config_of(cell["model"]))
    with torch.device(device):
        config = AutoConfig.for_model(**raw)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=cell["rank"], lora_alpha=2 * cell["rank"], target_modules=TARGETS[cell["targets"]])
    model: Any = get_peft_model(base, lora, autocast_adapter_dtype=False).train()  # bfloat16, its fastest
    if "checkpoint" in cell["contender"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, fused=device == "cuda")
    tokens, targets = (torch.as_tensor(x, device=device) for x in rows_of(cell, raw["vocab_size"]))

    def loss() -> Any:
        logits = peft_logits(model, tokens, cell["predicted"], use_cache=False)
        return torch.nn.functional.cross_entropy(logits, targets.flatten())

    forward = torch.compile(loss) if "compiled" in cell["contender"] else loss

    def advance() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    first, seconds = clocked(advance, finish, steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_gigabytes()
    return told(cell, first, seconds, peak, torch.cuda.get_device_name() if device == "cuda" else "cpu")


def update(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """The optimizers' updates alone, on the adapters of the model: ours, or torch's AdamW."""
    if cell["contender"] == "torch":
        return {"seconds": _torch_updates(cell, steps)}
    import jax
    import jax.numpy as jnp
    import optax

    from stable_lora_jax.training import METHODS, make_optimizer, split_model

    _, adapters, _ = split_model(adapted(cell))
    seconds = {}
    for method in METHODS:
        optimizer = make_optimizer(method, 5e-4, lam=0.001, ratio=4.0, weight_decay=0.0, clip_norm=1.0)

        def apply(params: Any, state: Any, optimizer: Any = optimizer) -> Any:
            grads = jax.tree.map(lambda p: 0.01 * p + 0.001, params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        apply = jax.jit(apply, donate_argnums=(0, 1))
        carry = [jax.tree.map(jnp.copy, adapters), optimizer.init(adapters)]

        def advance(apply: Any = apply, carry: Any = carry) -> None:
            carry[:] = apply(*carry)

        _, seconds[method] = clocked(advance, lambda carry=carry: jax.block_until_ready(carry), 20 * steps)
    return {"seconds": seconds}


def _torch_updates(cell: dict[str, Any], steps: int) -> dict[str, float]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    c = config_of(cell["model"])
    kv, query = c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
    shapes = [(8, c.hidden_size), (query, 8), (8, c.hidden_size), (kv, 8)] * c.num_layers
    found = {}
    for fused in (False, True):
        params = [torch.nn.Parameter(torch.randn(*shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.AdamW(params, lr=5e-4, fused=fused)

        def advance(optimizer: Any = optimizer) -> None:
            optimizer.step()

        finish = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        _, found["torch adamw, fused" if fused else "torch adamw"] = clocked(advance, finish, 20 * steps)
    return found


def sweep(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """K adapters in one program, 8 rows of 64 tokens each."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks.bench_timing import answer_batch
    from stable_lora_jax.training import (
        SweepPoint,
        compile_sweep_step,
        init_state,
        make_loss,
        make_mesh,
        make_optimizer,
        split_model,
    )

    count = cell["adapters"]
    graph, adapters, frozen = split_model(adapted(cell))

    def optimizer(point: SweepPoint) -> Any:
        return make_optimizer("stable-lora", point.learning_rate, lam=point.lam, weight_decay=0.0, clip_norm=1.0)

    rows = rows_of({"rows": 8, "length": 64, "predicted": 8}, config_of(cell["model"]).vocab_size)
    batch = jax.tree.map(lambda x: jnp.stack([x] * count), answer_batch(*rows))
    points = jax.tree.map(lambda x: jnp.full(count, x), SweepPoint(5e-4, 2.0, 0.001))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * count), adapters)
    state = jax.vmap(lambda one: init_state(one, optimizer(SweepPoint(5e-4, 2.0))))(stacked)
    step = compile_sweep_step(graph, make_loss("answer", 1), optimizer, mesh=make_mesh())

    def advance() -> None:
        nonlocal state
        state, _ = step(state, points, frozen, batch)

    first, seconds = clocked(advance, lambda: jax.block_until_ready(state), steps)
    return {"seconds": seconds, "first_seconds": round(first, 2), "peak_gb": round(jax_peak()[0], 3)}


def main(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """Returns what is measured of a cell."""
    if cell["kind"] != "step":
        return {"update": update, "sweep": sweep, "parity": parity}[cell["kind"]](cell, steps)
    return (peft if "peft" in cell["contender"] else ours)(cell, steps)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]), int(sys.argv[2]))))
