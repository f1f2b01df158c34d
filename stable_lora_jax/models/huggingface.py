"""Opens and writes a Hugging Face directory: config.json and safetensors files, one or sharded."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from stable_lora_jax.models.checkpoint import Checkpoint, Part
from stable_lora_jax.models.config import DecoderConfig
from stable_lora_jax.models.decoder import Decoder
from stable_lora_jax.models.hf_config import config_from_hf, config_to_hf

_DTYPES = ("F64", "F32", "F16", "BF16")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Phi-3 stores these as one tensor each, row by row: (its suffix) -> the projections that it is cut into.
_FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class _Tensor(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    first_row: int = 0


def open_huggingface(directory: Path) -> Checkpoint:
    """Returns the checkpoint in a directory with config.json and model.safetensors or its shards.

    Raises:
      FileNotFoundError: one of these files is missing.
      ValueError: the configuration is not supported, or a file is damaged.
    """
    config = config_from_hf(read_json(directory / "config.json"))
    tensors = {name: tensor for file in _weight_files(directory) for name, tensor in _read_header(file).items()}
    if config.model_type == "phi3":
        tensors = _cut(tensors, config)
    if config.tie_embeddings and _HEAD in tensors:
        # As in transformers: what the file holds counts, and whichever of the two it lacks is tied to the other.
        if _EMBEDDING not in tensors:
            tensors[_EMBEDDING] = tensors[_HEAD]
        elif not np.array_equal(_read_tensor(tensors[_HEAD]), _read_tensor(tensors[_EMBEDDING])):
            config = dataclasses.replace(config, tie_embeddings=False)

    def harmless(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and config.tie_embeddings)

    return Checkpoint(
        config=config,
        shapes={name: tensor.shape for name, tensor in tensors.items() if not harmless(name)},
        tensor_name=_tensor_name,
        read=lambda name, part: _read_tensor(tensors[name], part),
    )


def save_huggingface(
    directory: str | Path, model: Decoder, *, bos_id: int | None = None, eos_id: int | None = None
) -> None:
    """Writes config.json and model.safetensors, as transformers and `open_huggingface` load them.

    Tied embeddings stay tied: there is no lm_head tensor then.

    Args:
      directory: made if it is missing.
      model: without adapters, not quantized.
      bos_id: the tokenizer's start token, which transformers reads from config.json; None if there is none.
      eos_id: its end token, where transformers stops generating.

    Raises:
      ValueError: the model holds adapters or quantized weights; nothing is written.
      FileExistsError: the directory holds one of the two files.
    """
    directory = Path(directory)
    files = directory / "config.json", directory / "model.safetensors"
    if present := [file.name for file in files if file.exists()]:
        raise FileExistsError(f"{directory} holds {' and '.join(present)} already; give a new directory.")
    params = {".".join(map(str, keys)): param[...] for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if foreign := [path for path, value in params.items() if not _is_weight(path, value)]:
        raise ValueError(
            f"The model holds {', '.join(foreign[:8])}{' and more' if len(foreign) > 8 else ''}; config.json can "
            "describe only a plain model with floating weights; fold adapters in with merge_lora(model), and load the "
            "model without quantizing it."
        )
    tensors = {}
    for path, value in params.items():
        layers = enumerate(value) if path.startswith("layers.") else [(None, value)]
        for layer, matrix in layers:
            tensors[_tensor_name(path, layer)] = matrix.T if path.endswith(".kernel") else matrix
    if model.config.model_type == "phi3":
        tensors = _joined(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, files[1], metadata={"format": "pt"})
    dtype = model.embed_tokens.embedding.dtype
    config = config_to_hf(model.config) | {"dtype": str(dtype), "bos_token_id": bos_id, "eos_token_id": eos_id}
    files[0].write_text(json.dumps(config, indent=2) + "\n")


def _cut(tensors: dict[str, _Tensor], config: DecoderConfig) -> dict[str, _Tensor]:
    """Returns the tensors with every fused one as the rows of its projections."""
    query, kv, gate = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.intermediate_size,
    )
    rows = dict(zip(_FUSED, ((query, kv, kv), (gate, gate)), strict=True))
    cut: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        suffix = next((each for each in _FUSED if name.endswith(each)), None)
        if suffix is None:
            cut[name] = tensor
            continue
        if tensor.shape[0] != sum(rows[suffix]):
            raise ValueError(
                f"{tensor.file.name}: tensor {name} has {tensor.shape[0]} rows, config.json asks for "
                f"{sum(rows[suffix])}; the two do not belong together; download the model again."
            )
        first = 0
        for part, count in zip(_FUSED[suffix], rows[suffix], strict=True):
            cut[name.removesuffix(suffix) + part] = tensor._replace(shape=(count, *tensor.shape[1:]), first_row=first)
            first += count
    return cut


def _joined(tensors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Undoes `_cut`."""
    joined = dict(tensors)
    for suffix, parts in _FUSED.items():
        for name in [name for name in tensors if name.endswith(parts[0])]:
            prefix = name.removesuffix(parts[0])
            joined[prefix + suffix] = jnp.concatenate([joined.pop(prefix + part) for part in parts])
    return joined


def _is_weight(path: str, value: jax.Array) -> bool:
    return path.rpartition(".")[2] in _LEAVES and jnp.issubdtype(value.dtype, jnp.floating)


def _tensor_name(path: str, layer: int | None) -> str:
    module, leaf = path.rsplit(".", 1)
    return f"{huggingface_module(module, layer)}.{_LEAVES[leaf]}"


def huggingface_module(path: str, layer: int | None) -> str:
    """Returns the name in transformers of a module of a `Decoder`, of one layer if it is stacked over layers.

    Args:
      path: dotted, in our decoder.
      layer: its number, or None for a module that is not stacked.

    Examples:
      >>> huggingface_module("layers.self_attn.q_proj", 3)
      'model.layers.3.self_attn.q_proj'
    """
    if layer is not None:
        path = path.replace("layers", f"layers.{layer}", 1)
    return path if path == "lm_head" else f"model.{path}"


def joined_modules(model_type: str) -> dict[str, tuple[str, ...]]:
    """Returns the modules that transformers joins in one -> their parts here, by their last names, in order.

    Examples:
      >>> joined_modules("phi3")
      {'qkv_proj': ('q_proj', 'k_proj', 'v_proj'), 'gate_up_proj': ('gate_proj', 'up_proj')}
    """
    if model_type != "phi3":
        return {}
    return {whole.split(".")[1]: tuple(part.split(".")[1] for part in parts) for whole, parts in _FUSED.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a model directory.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a model directory holds it; complete the directory.")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not hold a JSON object ({error}); download or save it again.") from error


def _weight_files(directory: Path) -> list[Path]:
    # A single file goes before an index, which may be left over from a version in shards.
    if not (directory / _SINGLE).is_file() and (directory / _INDEX).is_file():
        shards = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(
                f"{directory / _INDEX} has no weight_map; it says which file holds which tensor; download or save it "
                "again."
            )
        names = sorted({str(name) for name in shards.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{directory / _INDEX} names {outside}; only files next to it are read; correct it.")
    else:
        names = [_SINGLE]
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} lacks {name}; weights are model.safetensors, or {_INDEX} and the files it lists; "
                "complete the directory (older .bin weights must be converted to safetensors)."
            )
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, _Tensor]:
    try:
        with safe_open(file, framework="numpy") as opened:
            names = opened.keys()
            parts = {name: opened.get_slice(name) for name in names}
            return {
                name: _Tensor(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}; download or save it again.") from error


def _read_tensor(tensor: _Tensor, part: Part = ()) -> np.ndarray:
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{tensor.file.name}: tensor {tensor.name} has type {tensor.dtype}; allowed are {', '.join(_DTYPES)}; "
            "save the model unquantised in one of these."
        )
    # Opened anew for every tensor: what one handle has mapped stays in memory as long as it is open.
    with safe_open(tensor.file, framework="numpy") as opened:
        rows, *others = (*part, *(slice(None),) * (len(tensor.shape) - len(part)))
        start, stop, _ = rows.indices(tensor.shape[0])
        return opened.get_slice(tensor.name)[slice(tensor.first_row + start, tensor.first_row + stop), *others]
