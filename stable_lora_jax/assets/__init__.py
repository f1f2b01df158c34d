"""Files from outside: the packaged model and questions that need no hub, and the header of a GGUF file."""

from stable_lora_jax.assets.gguf_metadata import read_gguf_metadata
from stable_lora_jax.assets.packaged import cache_dir, qa_wheel, smollm2_gguf

__all__ = ["cache_dir", "qa_wheel", "read_gguf_metadata", "smollm2_gguf"]
