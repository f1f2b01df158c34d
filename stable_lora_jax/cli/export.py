"""``stable-lora export``: an adapter in the form that PEFT, transformers and vLLM load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stable_lora_jax.cli.evaluate import HUB_NAMES, load_with_adapter
from stable_lora_jax.lora import read_adapter_spec, save_peft
from stable_lora_jax.models import huggingface_module

LARGEST_VLLM_RANK = 512


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter as a PEFT directory: adapter_config.json and adapter_model.safetensors."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run directory or an adapter file."""
    out: Annotated[Path, tyro.conf.Positional]
    """The directory to write; it must not hold an adapter yet."""
    format: str = "peft"
    """peft, the one known form."""
    base: str | None = None
    """What to write as the base model's name; the one the run was trained on if not given."""

    def __post_init__(self):
        if self.format != "peft":
            raise ValueError(f"format={self.format!r} is unknown. Known formats: peft.")


def export_command(config: ExportConfig) -> None:
    """Runs `stable-lora export`; see `ExportConfig`."""
    file = config.run / "adapter.safetensors" if config.run.is_dir() else config.run
    spec = read_adapter_spec(file)
    model = load_with_adapter(spec.base, file)
    base = config.base or HUB_NAMES.get(spec.base, spec.base)
    count = save_peft(config.out, model, base, huggingface_module)
    print(f"{config.out}: {count} modules, rank {spec.rank}, alpha {spec.alpha:g}, base {base}")
    if spec.rank > LARGEST_VLLM_RANK:
        print(f"Note: vLLM loads ranks up to {LARGEST_VLLM_RANK}; this adapter has {spec.rank}.")
