"""GPUs that nobody has here, described so that XLA compiles for them: `topologies.get_topology_desc`.

The H100's description is the one XLA ships for its own tests; those of the others are it with their published figures
in place (NVIDIA's A100 and H200 data sheets and the CUDA programming guide's table of compute capabilities). Memory,
buffers and dtypes of a program compiled so are those of a real card; which kernel is fastest is not known without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax

# The CUDA plugins that jax[cuda12] and jax[cuda13] bring.
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclass(frozen=True, kw_only=True)
class _Card:
    """What differs between cards."""

    name: str
    cores: int
    units: int  # float32 lanes of a core
    shared: int  # bytes of shared memory of a core
    bandwidth: int
    cache: int
    clock: float
    memory: int
    capability: str


_HOPPER = {"cores": 132, "units": 128, "shared": 233472, "cache": 52428800, "clock": 1.98}
_HOPPER |= {"capability": "major: 9 feature_extension: ACCELERATED_FEATURES"}
_CARDS = {
    "h100": _Card(name="NVIDIA H100 80GB HBM3", bandwidth=3352320000000, memory=84942979072, **_HOPPER),
    "h200": _Card(name="NVIDIA H200", bandwidth=4800000000000, memory=150754820096, **_HOPPER),
    "a100": _Card(
        name="NVIDIA A100-SXM4-80GB",
        cores=108,
        units=64,
        shared=167936,
        bandwidth=2039000000000,
        cache=41943040,
        clock=1.41,
        memory=84942979072,
        capability="major: 8",
    ),
}


def has_gpu_compiler() -> bool:
    """Returns whether the CUDA plugin, which compiles for NVIDIA GPUs, is installed."""
    return any(find_spec(name) is not None for name in _PLUGINS)


def described_gpus(generation: str, count: int) -> Sequence[Any]:
    """Returns devices of one host that stand for cards nobody has: programs compile for them and do not run.

    Args:
      generation: "h100", "h200" or "a100".
      count: cards of the host.

    Raises:
      ValueError: the CUDA plugin is missing.
    """
    if not has_gpu_compiler():
        raise ValueError(
            "The CUDA plugin is not installed, so nothing compiles for GPUs. Install stable-lora-jax[cuda]."
        )
    from jax.experimental import topologies

    shape = f"1x1x{count}"
    described: Any = topologies.get_topology_desc(
        platform="cuda", topology_name=shape, topology=shape, target_config=_target(_CARDS[generation])
    )
    assert all(isinstance(device, jax.Device) for device in described.devices)
    return described.devices


def _target(card: _Card) -> str:
    """Returns XLA's text form of a card: a `GpuTargetConfigProto`."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared}
  threads_per_core_limit: 2048
  core_count: {card.cores}
  fpus_per_core: {card.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth}
  l2_cache_size: {card.cache}
  clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory}
  shared_memory_per_block_optin: {card.shared - 1024}
  cuda_compute_capability {{ {card.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{card.name}"
"""
