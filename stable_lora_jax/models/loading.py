"""Fills a decoder from a model file, tensor by tensor.

Memory stays near the model's own size: the decoder is built abstractly, each stacked parameter is allocated once and
its layers are written into it in place, and no more than one stored tensor is in memory at a time. On a mesh each
process reads only what its devices hold, and no more than one device's part of a parameter is in memory beside them.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import ArrayLike, DTypeLike

from stable_lora_jax.models.attention import choose_attention
from stable_lora_jax.models.checkpoint import Checkpoint
from stable_lora_jax.models.decoder import Decoder
from stable_lora_jax.models.gguf import open_gguf
from stable_lora_jax.models.huggingface import open_huggingface


def _smollm2_135m() -> Path:
    # Imported late: only this alias needs the data package.
    from stable_lora_jax.assets.packaged import smollm2_gguf

    return smollm2_gguf()


_ALIASES = {"smollm2-135m": _smollm2_135m}


def load_model(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    attention: str = "auto",
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Decoder:
    """Returns a decoder with the weights of a model of one of the families in `models.families`.

    Args:
      name_or_path: the alias "smollm2-135m", a .gguf file, a Hugging Face directory (config.json and safetensors),
        or a Hugging Face hub name ("owner/model").
      dtype: of the computation.
      param_dtype: of the stored parameters.
      remat: recompute each layer in the backward pass.
      attention: "auto", "xla", "cudnn" or "splash" (see `choose_attention`).
      sharding: where a parameter goes, from its dotted path and shape, such as `training.parameter_sharding(mesh)`;
        the default device if None.

    Raises:
      ValueError: the name is unknown, the model is not supported, a file is damaged, or tensors are missing,
        unexpected, of the wrong shape or not finite.
      FileNotFoundError: a directory lacks a file.
      ConnectionError: the hub did not give the model.
    """
    checkpoint = _open(name_or_path)
    chosen = choose_attention(attention, dtype=dtype, head_dim=checkpoint.config.head_dim)
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "attention": chosen}
    decoder = nnx.eval_shape(lambda: Decoder(checkpoint.config, rngs=nnx.Rngs(0), **options))
    params = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}
    names = {path: _stored_names(checkpoint, path) for path in params}
    _check_tensors(checkpoint, params, names)
    # Largest tensors first: what is briefly held twice is then held while the model is still small.
    for path in sorted(params, key=lambda path: -params[path].size // len(names[path])):
        param = params[path]
        if sharding is None:
            value = _read_param(checkpoint, path, names[path], param)
        else:
            value = _read_shards(checkpoint, path, names[path], param, sharding(path, param.shape))
        if not _all_finite(value):
            raise ValueError(
                f"The model's {path} holds NaN or infinity; weights are finite numbers; fetch the file again, or load "
                "it in a wider dtype."
            )
        params[path].set_value(value)
    return decoder


def _open(name_or_path: str | Path) -> Checkpoint:
    name, path = str(name_or_path), Path(name_or_path)
    if name in _ALIASES:
        return open_gguf(_ALIASES[name]())
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    if path.is_dir():
        return open_huggingface(path)
    if isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and path.suffix != ".gguf":
        return open_huggingface(_download(name))
    raise ValueError(
        f"load_model: no model {name!r}; allowed are the aliases {', '.join(_ALIASES)}, an existing .gguf file, an "
        "existing directory with config.json and safetensors, or a hub name 'owner/model'; correct the name or path."
    )


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConnectionError(
            f"load_model: {name!r} is no local path, and the Hugging Face hub did not give it ({error}); allowed are "
            "public models or ones your token may read; check the name and the network, or download the directory "
            "elsewhere and pass its path."
        ) from error


def _stored_names(checkpoint: Checkpoint, path: str) -> list[str]:
    """Returns one stored name per layer for a stacked parameter, else a single name."""
    layers = range(checkpoint.config.num_layers) if path.startswith("layers.") else [None]
    return [checkpoint.tensor_name(path, layer) for layer in layers]


def _check_tensors(checkpoint: Checkpoint, params: dict[str, nnx.Param], names: dict[str, list[str]]) -> None:
    expected = {name: _stored_shape(path, params[path]) for path in params for name in names[path]}
    if missing := sorted(expected.keys() - checkpoint.shapes.keys()):
        raise ValueError(
            f"The model file lacks {len(missing)} tensors: {', '.join(missing)}; every parameter of the decoder needs "
            "one; check that file and configuration belong together and the file is complete."
        )
    if unexpected := sorted(checkpoint.shapes.keys() - expected.keys()):
        raise ValueError(
            f"The model file holds {len(unexpected)} unexpected tensors: {', '.join(unexpected)}; allowed are only "
            "those of the architecture; check that file and configuration belong together."
        )
    for name, shape in expected.items():
        if checkpoint.shapes[name] != shape:
            raise ValueError(
                f"Tensor {name} has shape {checkpoint.shapes[name]}; the configuration asks for {shape}; "
                "check that file and configuration belong together."
            )


def _stored_shape(path: str, param: nnx.Param) -> tuple[int, ...]:
    shape = param.shape[1:] if path.startswith("layers.") else param.shape
    return shape[::-1] if path.endswith(".kernel") else shape


def _read_param(checkpoint: Checkpoint, path: str, names: list[str], param: nnx.Param) -> jax.Array:
    def read(name: str) -> np.ndarray:
        value = checkpoint.read(name, ())
        return value.T if path.endswith(".kernel") else value

    if not path.startswith("layers."):
        return jnp.array(read(names[0]), param.dtype)
    stacked = jnp.zeros(param.shape, param.dtype)
    for layer, name in enumerate(names):
        stacked = _write_layer(stacked, read(name), layer)
    return stacked


def _read_shards(
    checkpoint: Checkpoint, path: str, names: list[str], param: nnx.Param, sharding: Sharding
) -> jax.Array:
    """Returns a parameter of which this process has read what its devices hold."""
    devices: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(param.shape).items():
        assert index is not None  # for the type checker
        part = tuple(each.indices(size) for each, size in zip(index, param.shape, strict=True))
        devices.setdefault(part, []).append(device)
    shards = []
    for part, held_by in devices.items():
        block = np.empty([stop - start for start, stop, _ in part], param.dtype)
        own = part[1:] if path.startswith("layers.") else part
        stored = tuple(slice(start, stop) for start, stop, _ in (own[::-1] if path.endswith(".kernel") else own))
        layers = range(*part[0]) if path.startswith("layers.") else [None]
        for position, layer in enumerate(layers):
            value = checkpoint.read(names[layer or 0], stored)
            block[position if layer is not None else ...] = value.T if path.endswith(".kernel") else value
        shards += [jax.device_put(block, device) for device in held_by]
        jax.block_until_ready(shards[-len(held_by) :])
    return jax.make_array_from_single_device_arrays(param.shape, sharding, shards)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stacked: jax.Array, value: ArrayLike, layer: ArrayLike) -> jax.Array:
    return stacked.at[layer].set(jnp.asarray(value, stacked.dtype))


@jax.jit
def _all_finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()
