"""Opens and writes a Hugging Face directory: config.json and safetensors files, one or sharded.

safetensors files are read here rather than by the safetensors package for two reasons: its NumPy interface knows no
bfloat16, and it maps whole files into memory, which doubles the peak while a large model is loading. The format is
8 bytes of header length (little-endian), the header as JSON, then the tensors' bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.flax import save_file

from stable_lora_jax.models.checkpoint import Checkpoint
from stable_lora_jax.models.config import config_from_hf, config_to_hf
from stable_lora_jax.models.decoder import Decoder

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INDEX = "model.safetensors.index.json"
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """Where a tensor lies in its file; offset and size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def open_huggingface(directory: Path) -> Checkpoint:
    """The checkpoint in a directory with config.json and model.safetensors or its shards.

    Raises:
        FileNotFoundError: one of these files is missing.
        ValueError: the configuration is not supported, or a file is damaged.
    """
    config = config_from_hf(read_json(directory / "config.json"))
    tensors = {name: tensor for file in _weight_files(directory) for name, tensor in _read_header(file).items()}

    def harmless(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings)

    return Checkpoint(
        config=config,
        shapes={name: tensor.shape for name, tensor in tensors.items() if not harmless(name)},
        tensor_name=_tensor_name,
        read=lambda name: _read_tensor(name, tensors[name]),
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
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, files[1], metadata={"format": "pt"})
    dtype = model.embed_tokens.embedding.dtype
    config = config_to_hf(model.config) | {"dtype": str(dtype), "bos_token_id": bos_id, "eos_token_id": eos_id}
    files[0].write_text(json.dumps(config, indent=2) + "\n")


def _is_weight(path: str, value: jax.Array) -> bool:
    return path.rpartition(".")[2] in _LEAVES and jnp.issubdtype(value.dtype, jnp.floating)


def _tensor_name(path: str, layer: int | None) -> str:
    module, leaf = path.rsplit(".", 1)
    return f"{huggingface_module(module, layer)}.{_LEAVES[leaf]}"


def huggingface_module(path: str, layer: int | None) -> str:
    """Returns the name in transformers of a module of a `Decoder`, of one layer if it is stacked over layers.

    >>> huggingface_module("layers.self_attn.q_proj", 3)
    'model.layers.3.self_attn.q_proj'
    """
    if layer is not None:
        path = path.replace("layers", f"layers.{layer}", 1)
    return path if path == "lm_head" else f"model.{path}"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory.

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
    if (directory / _INDEX).is_file():
        shards = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(
                f"{directory / _INDEX} has no weight_map; it says which file holds which tensor; download or save it "
                "again."
            )
        names = sorted(set(shards.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} lacks {name}; weights are model.safetensors, or {_INDEX} and the files it lists; "
                "complete the directory (older .bin weights must be converted to safetensors)."
            )
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, _Tensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise _damaged(file, f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor_entry(file, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, "its header is not a safetensors header") from error
    needed = max((tensor.offset + tensor.size for tensor in tensors.values()), default=0)
    if needed > size:
        raise _damaged(file, f"it has {size} bytes and its header promises {needed}")
    return tensors


def _tensor_entry(file: Path, start: int, entry: dict[str, Any]) -> _Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is not None and end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{end - begin} bytes cannot hold shape {shape} of {entry['dtype']}")
    return _Tensor(file=file, dtype=entry["dtype"], shape=shape, offset=start + begin, size=end - begin)


def _read_tensor(name: str, tensor: _Tensor) -> np.ndarray:
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{tensor.file.name}: tensor {name} has type {tensor.dtype}; allowed are {', '.join(_DTYPES)}; "
            "save the model unquantised in one of these."
        )
    raw = np.fromfile(tensor.file, np.uint8, count=tensor.size, offset=tensor.offset)
    return raw.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} is not a whole safetensors file: {what}; download or save it again.")
