"""``stable-lora export``: an adapter, or the model with it folded in, for PEFT, transformers, vLLM and llama.cpp."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from stable_lora_jax.data import load_tokenizer
from stable_lora_jax.finetune import HUB_NAMES, adapter_file, base_of, check_choice, load_with_adapter, record_of
from stable_lora_jax.locations import check_local
from stable_lora_jax.lora import TARGETS, AdapterSpec, merge_lora, read_adapter_spec, save_peft
from stable_lora_jax.lora.peft_files import CONFIG as PEFT_CONFIG
from stable_lora_jax.models import huggingface_module, joined_modules, save_gguf_adapter, save_huggingface

# vLLM 0.14: what its --max-lora-rank may be; it loads adapters of any rank up to that, by default up to 16.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_MAX_RANK = 16


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter as a PEFT directory or a GGUF file, or with its base model as a Hugging Face directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run directory or an adapter file; for merged, a PEFT directory too."""
    out: Annotated[Path, tyro.conf.Positional]
    """The directory to write, for gguf the file; it must not hold an adapter or a model yet."""
    model: str | None = None
    """The base model, if it is elsewhere now than where the adapter names it."""
    format: str = "peft"
    """peft (adapter_config.json and adapter_model.safetensors), gguf (a file for llama.cpp's --lora), or merged (the
    whole model and its tokenizer)."""
    base: str | None = None
    """peft: what to write as the base model's name; the one the run was trained on if not given."""
    dtype: str = "float32"
    """merged: of the weights, float32 or bfloat16."""

    def __post_init__(self):
        check_local(out=self.out)
        check_choice("format", self.format, ("peft", "gguf", "merged"))
        for only, name in (("peft", "base"), ("merged", "dtype")):
            if self.format != only and getattr(self, name) != getattr(ExportConfig, name):
                raise ValueError(f"{name} says nothing about {self.format}. Leave it out, or choose {only}.")


def export_command(config: ExportConfig) -> None:
    """Runs `stable-lora export`; see `ExportConfig`."""
    name = base_of(config.model, config.run)
    if config.format == "merged":
        tokenizer: Any = load_tokenizer(name)
        model = merge_lora(load_with_adapter(name, config.run, config.dtype))
        save_huggingface(config.out, model, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id)
        tokenizer.save_pretrained(config.out)
        print(f"{config.out}: {name} with the adapter folded in")
        if quantized := record_of(config.run).get("config", {}).get("model", {}).get("quantize"):
            print(
                f"Note: it was trained on the base in {quantized}, and is folded into the base as it was before that."
            )
        return
    if config.format == "gguf":
        count = save_gguf_adapter(config.out, load_with_adapter(name, config.run))
        print(f"{config.out}: {count} matrices for llama.cpp, next to a GGUF file of {name}")
        return
    spec, model = read_adapter_spec(adapter_file(config.run)), load_with_adapter(name, config.run)
    base = config.base or HUB_NAMES.get(name, name)
    count = save_peft(config.out, model, base, huggingface_module, joined_modules(model.config.model_type))
    print(f"{config.out}: {count} modules, rank {spec.rank}, alpha {spec.alpha:g}, base {base}")
    written = json.loads((config.out / PEFT_CONFIG).read_text())
    for note in vllm_notes(spec, max([written["r"], *written["rank_pattern"].values()])):
        print(f"Note: {note}")


def vllm_notes(spec: AdapterSpec, largest: int) -> list[str]:
    """Returns what vLLM needs to be told to load an adapter, or why it will not; nothing if it just loads.

    Args:
      spec: of the adapter.
      largest: of the ranks that its PEFT directory has.
    """
    notes = []
    beyond = {"DoRA": spec.use_dora, "modules_to_save": bool(spec.whole)}
    if any(beyond.values()):
        named = " and ".join(name for name, used in beyond.items() if used)
        notes.append(f"vLLM loads no adapters with {named}; serve the merged model (--format merged).")
    if largest > VLLM_MAX_RANKS[-1]:
        notes.append(f"vLLM loads ranks up to {VLLM_MAX_RANKS[-1]}; this adapter has {largest}.")
    elif largest > VLLM_DEFAULT_MAX_RANK:
        needed = next(rank for rank in VLLM_MAX_RANKS if rank >= largest)
        notes.append(f"vLLM loads this adapter of rank {largest} with --max-lora-rank {needed}.")
    if others := {path.rpartition(".")[2] for path in spec.targets} - set(TARGETS["qkvogud"]):
        notes.append(f"vLLM may not load adapters on {', '.join(sorted(others))}; it does on the layers' projections.")
    return notes
