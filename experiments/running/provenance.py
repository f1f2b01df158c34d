"""What made a number: machine, versions, commit."""

import os
import platform
from pathlib import Path
from typing import Any

from stable_lora_jax.training.provenance import commit as package_commit
from stable_lora_jax.training.provenance import versions


def machine() -> dict[str, Any]:
    """Returns the processor, its number of cores and its architecture."""
    listed = Path("/proc/cpuinfo")  # of Linux
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "architecture": platform.machine()}


def has_bfloat16() -> bool:
    """Returns whether this machine multiplies bfloat16 matrices by instructions of its own."""
    import jax

    if jax.default_backend() != "cpu":
        return True
    listed = Path("/proc/cpuinfo")  # of Linux; elsewhere float32 is the safe answer
    words = set(listed.read_text().split()) if listed.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"})


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
