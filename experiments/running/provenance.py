"""What made a number: machine, versions, commit."""

import os
import platform
from pathlib import Path
from typing import Any

from stable_lora_jax.training.provenance import commit as package_commit
from stable_lora_jax.training.provenance import versions

# Instructions that matrix products are made of, the widest first.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "svebf16", "sve", "asimd")


def machine() -> dict[str, Any]:
    """Returns the processor, its number of cores, its architecture and its widest instructions for products.

    Hosts hide which generation a processor is of ("AMD EPYC"), so its name alone does not tell machines apart.
    """
    lines = _cpuinfo().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    cpu, known = names[0].partition(":")[2].strip() if names else platform.processor(), set(_cpuinfo().split())
    widest = next((name for name in _INSTRUCTIONS if name in known), None)
    return {"cpu": cpu, "cores": os.cpu_count(), "architecture": platform.machine(), "instructions": widest}


def has_bfloat16() -> bool:
    """Returns whether this machine multiplies bfloat16 matrices by instructions of its own."""
    import jax

    if jax.default_backend() != "cpu":
        return True
    # Where nothing is listed, float32 is the safe answer.
    return bool(set(_cpuinfo().split()) & {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"})


def _cpuinfo() -> str:
    """Returns what Linux tells of its processors; nothing elsewhere."""
    listed = Path("/proc/cpuinfo")
    return listed.read_text() if listed.exists() else ""


def provenance() -> dict[str, Any]:
    """Returns what made a line: commit (with + if the code was changed since), versions, machine."""
    import jax

    device = {"device": jax.devices()[0].device_kind, "system": platform.system()}
    return {
        "commit": commit(),
        "versions": versions("jax", "flax", "optax", "numpy"),
        "machine": machine() | device,
    }


def commit() -> str | None:
    """Returns the checkout's commit, with + if the code was changed since; None without git."""
    return package_commit(Path(__file__).parents[1], ("../stable_lora_jax", "*.py"))
