"""Unrolling: what a loop over layers costs on an H100, counted in the compiled step.

Question:  of a step of Llama-3.2-1B, how many FLOPs and bytes does a loop over layers add to layers that are written
           out, and what do these cost in memory and in compilation?
Command:   make unrolling       (needs the CUDA plugin, no GPU)
Hardware:  2 CPU cores. Minutes: 6.
Observed:  (2026-11-30) the loop moves 22 to 29 GB more, a quarter to a third, which is 6 to 9 ms of an H100's memory,
           and computes 1.7 to 1.8 TFLOP more, mostly the last layer's for tokens that are not read; with cuBLAS and
           jax 0.11 another 10. Written out, compiling takes 2 to 3 times as long.

The real step, bfloat16 base, LoRA r = 8 on q and v, 128 predicted tokens per row. A described card has no autotuning,
so XLA takes its own kernels for all products; with a card it may take cuBLAS. Both are compiled. No time is measured.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.running.markdown import markdown
from experiments.running.provenance import commit
from stable_lora_jax.models import choose_attention
from stable_lora_jax.models.known_configs import KNOWN_CONFIGS
from stable_lora_jax.planning import Workload, lower, parse_topology, topology_devices
from stable_lora_jax.planning.work import read_gpu_work
from stable_lora_jax.training import make_mesh

LLAMA = KNOWN_CONFIGS["llama-3.2-1b"]
SIZES = ((8, 1024), (2, 4096))  # rows, tokens per row
PRODUCTS = {"XLA": None, "cuBLAS": {"xla_gpu_enable_triton_gemm": False}}


@dataclass(frozen=True, kw_only=True)
class UnrollingConfig:
    """Compile the step looped over and written out, and add what was counted to a file."""

    out: Path = Path("experiments/results/unrolling.json")
    """The file; what the same version of JAX gave is replaced."""


def main(config: UnrollingConfig) -> None:
    jax.config.update("jax_platforms", "cpu")  # only compiled for: no GPU is looked for
    mesh = make_mesh(devices=topology_devices(parse_topology("h100:1")))
    attention = choose_attention("auto", dtype=jnp.bfloat16, head_dim=LLAMA.head_dim, device=mesh.devices.flat[0])
    lines = json.loads(config.out.read_text()) if config.out.exists() else []
    lines = [line for line in lines if line["jax"] != jax.__version__]
    for rows, length in SIZES:
        workload = Workload(config=LLAMA, rows=rows, length=length, num_targets=128, attention=attention)
        for products, options in PRODUCTS.items():
            for unroll in (False, True):
                lowered = lower(workload, mesh, unroll=unroll)
                start = time.perf_counter()
                work = read_gpu_work(lowered.compile(compiler_options=options), mesh.size)
                line = {
                    "command": "make unrolling",
                    "commit": commit(),
                    "jax": jax.__version__,
                    "rows": rows,
                    "length": length,
                    "products": products,
                    "unroll": unroll,
                    "compile_seconds": round(time.perf_counter() - start, 1),
                    "flops": work.flops,
                    "bytes_accessed": work.bytes_accessed,
                    "temporaries": work.temporaries,
                }
                lines.append(line)
                print(line, flush=True)
    config.out.write_text(json.dumps(lines, indent=1) + "\n")
    print(table(lines))


def table(lines: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: what is looped over, and what is written out."""
    found: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in ("rows", "length", "jax", "products")), {})[line["unroll"]] = line
    header = ("rows × tokens", "jax", "products by", "TFLOP", "GB moved", "GB of temporaries", "seconds to compile")
    rows = [
        (
            f"{rows} × {length}",
            version,
            products,
            _both(pair, "flops", 1e12),
            _both(pair, "bytes_accessed", 1e9),
            _both(pair, "temporaries", 1e9),
            _both(pair, "compile_seconds", 1.0),
        )
        for (rows, length, version, products), pair in found.items()
    ]
    return markdown(header, rows) + "\n"


def _both(pair: dict[bool, dict[str, Any]], field: str, unit: float) -> str:
    return " → ".join(f"{pair[unroll][field] / unit:.1f}" for unroll in (False, True))


if __name__ == "__main__":
    main(tyro.cli(UnrollingConfig))
