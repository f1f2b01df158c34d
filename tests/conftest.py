"""Eight simulated devices for the sharding tests, no reaching for a hub, and every annotated shape is checked."""

import os

# Tests compile more than they compute, so the compiler optimises little.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from jaxtyping import install_import_hook

from tests import typechecking

install_import_hook("stable_lora_jax", f"{typechecking.__name__}.checked")


@pytest.fixture
def eight_devices() -> list[jax.Device]:
    return jax.devices()[:8]
