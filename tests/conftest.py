"""Eight simulated devices for the sharding tests; no test may reach for a hub."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest


@pytest.fixture
def eight_devices() -> list[jax.Device]:
    return jax.devices()[:8]
