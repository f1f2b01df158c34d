"""Writes an adapter as a GGUF file, as llama.cpp loads with --lora (the layout of its convert_lora_to_gguf.py).

A tensor TENSOR.lora_a is A transposed, (r, n), and TENSOR.lora_b is B transposed, (m, r), for the base file's TENSOR.
llama.cpp scales by adapter.lora.alpha / r. Where it stores the rows of query and key projections with each rotary pair
side by side, the rows of B follow.
"""

from pathlib import Path

import gguf
import numpy as np

from stable_lora_jax.lora import adapter_spec, lora_modules
from stable_lora_jax.models.decoder import Decoder
from stable_lora_jax.models.gguf import MODULES

# Our model_type -> llama.cpp's architecture, and whether its converter reorders the rows of queries and keys.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma3_text": ("gemma3", False),
}


def save_gguf_adapter(file: str | Path, model: Decoder) -> int:
    """Writes the adapters of `model`, in float32, and returns how many matrices of the base they adapt.

    Args:
      file: to write; it must not exist. It appears whole or not at all.
      model: a model with adapters.

    Raises:
      ValueError: no adapters; DoRA's, which llama.cpp does not know; a family or a module that has no counterpart here.
      FileExistsError: the file is there already.
    """
    file, config, modules = Path(file), model.config, lora_modules(model)
    spec = adapter_spec(model, "")
    if spec.use_dora:
        raise ValueError("llama.cpp knows no magnitudes, which DoRA's adapters have. Export the merged model instead.")
    if spec.whole:
        whole = ", ".join(spec.whole)
        raise ValueError(
            f"llama.cpp's adapters hold no whole modules, as {whole} are. Export the merged model instead."
        )
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Adapters of model_type={config.model_type!r} are not written as GGUF; those of "
            f"{', '.join(ARCHITECTURES)} are. Export the merged model, and convert that with llama.cpp."
        )
    ends = {"embed_tokens", "lm_head"}  # whose adapters llama.cpp takes in other layouts, or, tied, not at all
    if unknown := [path for path in modules if path not in MODULES or path in ends]:
        raise ValueError(
            f"Adapters of {', '.join(unknown)} are not written as GGUF. Export the merged model, or leave them out."
        )
    if file.exists():
        raise FileExistsError(f"{file} exists already. Give a new file.")
    architecture, in_pairs = ARCHITECTURES[config.model_type]
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if in_pairs else {}
    alpha = next(iter(modules.values())).scale * next(iter(modules.values())).rank
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    count = 0
    for path, module in modules.items():
        # The file has one alpha: where a module has another scale, its B takes up the difference.
        factor, name = module.scale * module.rank / alpha, MODULES[path]
        a, b = (np.asarray(x[...], np.float32) for x in (module.lora_a, module.lora_b))
        layers = [("", a, b)] if a.ndim == 2 else [(f"blk.{i}.", a[i], b[i]) for i in range(len(a))]
        for prefix, one_a, one_b in layers:
            rows = np.float32(factor) * one_b.T
            rows = halves_to_pairs(rows, heads[name]) if name in heads else rows
            writer.add_tensor(f"{prefix}{name}.weight.lora_a", np.ascontiguousarray(one_a.T))
            writer.add_tensor(f"{prefix}{name}.weight.lora_b", np.ascontiguousarray(rows))
            count += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(file)
    return count


def halves_to_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns the rows of each head as (first, second, first, second, ...) instead of (first half, second half)."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
