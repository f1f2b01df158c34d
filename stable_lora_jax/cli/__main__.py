"""``python -m stable_lora_jax.cli``, the same as ``stable-lora``."""

import sys

from stable_lora_jax.cli import run

sys.exit(run())
