"""LoRA adapters for Flax NNX models: y = x W + s (x A) B, A: (n, r), B: (r, m), s = alpha / r."""

from stable_lora_jax.extras import needs

with needs("flax"):
    from stable_lora_jax.lora.adapter_file import (
        AdapterSpec,
        adapter_spec,
        load_adapter,
        read_adapter_spec,
        same_base,
        save_adapter,
    )
    from stable_lora_jax.lora.injection import TARGETS, inject_lora, lora_modules, merge_lora
    from stable_lora_jax.lora.layer import LoRALayer
    from stable_lora_jax.lora.linear import LoRALinear
    from stable_lora_jax.lora.peft_directory import inject_peft, save_peft
    from stable_lora_jax.lora.quantized import QUANTIZATIONS, QuantizedLinear, quantize_linears
    from stable_lora_jax.lora.vocabulary import LoRAEmbed, LoRATiedHead
    from stable_lora_jax.lora.whole_modules import train_whole, whole_modules

__all__ = [
    "QUANTIZATIONS",
    "TARGETS",
    "AdapterSpec",
    "LoRAEmbed",
    "LoRALayer",
    "LoRALinear",
    "LoRATiedHead",
    "QuantizedLinear",
    "adapter_spec",
    "inject_lora",
    "inject_peft",
    "load_adapter",
    "lora_modules",
    "merge_lora",
    "quantize_linears",
    "read_adapter_spec",
    "same_base",
    "save_adapter",
    "save_peft",
    "train_whole",
    "whole_modules",
]
