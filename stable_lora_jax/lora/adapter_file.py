"""Adapter files: one safetensors file with the A and B matrices, DoRA's magnitudes, and what they belong to."""

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stable_lora_jax.locations import Location, local_copy, location, write_whole
from stable_lora_jax.lora.injection import lora_modules
from stable_lora_jax.lora.whole_modules import whole_modules, whole_params

_KEY = "stable_lora_jax"


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter file was trained as: everything that `inject_lora` needs to make room for it.

    Attributes:
      base: name of the base model, as given to `load_model`.
      rank: r, of most layers.
      alpha: numerator of the scale, of most layers.
      use_rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
      targets: dotted paths of the adapted layers.
      ranks: path -> r of the layers that have another.
      alphas: path -> alpha of the layers that have another.
      use_dora: whether the layers have magnitudes too.
      whole: dotted paths of the modules that were trained whole.
    """

    base: str
    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    whole: tuple[str, ...] = ()

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The other ranks, as `inject_lora` takes them."""
        return {re.escape(path): rank for path, rank in self.ranks.items()}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """The other alphas, as `inject_lora` takes them."""
        return {re.escape(path): alpha for path, alpha in self.alphas.items()}


def adapter_spec(model: nnx.Module, base: str) -> AdapterSpec:
    """Returns the spec of the adapters inside `model`.

    Raises:
      ValueError: no adapters, or some with and some without rslora, or DoRA.
    """
    modules = lora_modules(model)
    if not modules:
        raise ValueError("The model has no LoRA adapters. Call inject_lora(model, ...) first.")
    if len({module.use_rslora for module in modules.values()}) != 1:
        raise ValueError(
            "The model has adapters with rslora and without. An adapter file holds one kind: inject all layers alike."
        )
    dora = {module.magnitude is not None for module in modules.values()}
    if len(dora) != 1:
        raise ValueError(
            "The model has adapters with DoRA's magnitudes and without. An adapter file holds one kind: inject all "
            "layers alike."
        )
    rank = statistics.mode(module.rank for module in modules.values())
    alpha = statistics.mode(module.alpha for module in modules.values())
    return AdapterSpec(
        base=base,
        rank=rank,
        alpha=alpha,
        use_rslora=next(iter(modules.values())).use_rslora,
        targets=tuple(modules),
        ranks={path: module.rank for path, module in modules.items() if module.rank != rank},
        alphas={path: module.alpha for path, module in modules.items() if module.alpha != alpha},
        use_dora=dora.pop(),
        whole=tuple(whole_modules(model)),
    )


def save_adapter(path: str | Location, model: nnx.Module, base: str) -> None:
    """Writes the adapters of `model` to a safetensors file: ``<dotted path>.lora_a``, ``.lora_b``, ``.magnitude``.

    Args:
      path: file to write, also gs://BUCKET/...; its folder is made, and the file appears whole or not at all.
      model: a model with adapters.
      base: name of the base model they belong to.

    Raises:
      ValueError: as `adapter_spec`.
    """
    spec = adapter_spec(model, base)
    tensors = {key: np.asarray(matrix[...]) for key, matrix in _matrices(model).items()}
    path = location(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, metadata={_KEY: json.dumps(asdict(spec))}))


def read_adapter_spec(path: str | Location) -> AdapterSpec:
    """Returns what an adapter file was trained as, without reading its matrices.

    Raises:
      ValueError: no such file, or a file that is no adapter of ours.
    """
    if not location(path).is_file():
        raise ValueError(f"There is no adapter file {path}. Give a run directory, or the .safetensors file of one.")
    try:
        with local_copy(path) as copy, safe_open(copy, framework="numpy") as file:
            metadata = (file.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); it may be truncated.") from error
    if metadata is None:
        raise ValueError(f"{path} is a safetensors file, but not an adapter that save_adapter wrote.")
    try:
        fields: dict[str, Any] = dict(json.loads(metadata))
        for name in ("targets", "whole"):
            fields[name] = tuple(fields.get(name, ()))
        if not fields["targets"]:
            raise ValueError("no targets")
        spec = AdapterSpec(**fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} has a header that save_adapter did not write ({type(error).__name__}: {error}). Copy it again."
        ) from error
    kinds = {"base": str, "rank": int, "alpha": int | float, "use_rslora": bool, "ranks": dict, "alphas": dict}
    kinds["use_dora"] = bool
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(spec, name), kind)]
    others = () if wrong else (*spec.ranks.values(), *spec.alphas.values())
    numbers = all(isinstance(each, int | float) for each in others)
    if wrong or not numbers or not all(isinstance(path, str) for path in (*spec.targets, *spec.whole)) or spec.rank < 1:
        raise ValueError(f"{path} has a header that save_adapter did not write: {fields}. Copy it again.")
    return spec


def load_adapter(path: str | Location, model: nnx.Module, base: str) -> None:
    """Fills the adapters of `model` from a file that was saved from the same base, rank, alpha and targets.

    Args:
      path: an adapter file.
      model: a model into which adapters were injected; only their values change.
      base: name of the base model that `model` is (see `same_base`).

    Raises:
      ValueError: another base, rank, alpha, rslora or targets (each named with both values), other shapes, or a
        damaged file; the model is then unchanged.
    """
    saved, wanted = asdict(read_adapter_spec(path)), asdict(adapter_spec(model, base))
    differing = [field for field in saved if saved[field] != wanted[field]]
    if same_base(saved["base"], base):
        differing = [field for field in differing if field != "base"]
    if differing:
        what = "; ".join(f"{field}: file {saved[field]!r}, model {wanted[field]!r}" for field in differing)
        raise ValueError(
            f"The adapter {path} does not belong to this model ({what}). Load it onto its own base, injected with its "
            "own rank, alpha and targets: read_adapter_spec(path) tells them."
        )
    slots = _matrices(model)
    try:
        with local_copy(path) as copy, safe_open(copy, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in slots}
    except SafetensorError as error:
        raise ValueError(f"{path} lacks what its targets name ({error}). Copy it again from its run.") from error
    for key, slot in slots.items():
        if tensors[key].shape != slot.shape:
            raise ValueError(
                f"{key} has shape {tensors[key].shape} in {path}, but {slot.shape} in the model: the adapter was "
                "trained on a base model of another size."
            )
        if not np.isfinite(tensors[key].astype(np.float32)).all():
            raise ValueError(
                f"{key} holds NaN or infinity in {path}. The training that wrote it has failed: go back to an earlier "
                "checkpoint of it."
            )
    for key, slot in slots.items():
        slot[...] = jnp.asarray(tensors[key], slot.dtype)


def same_base(one: str, other: str) -> bool:
    """Returns whether two names mean the same base model: what follows the last slash is compared, as models move.

    Examples:
      >>> same_base("meta-llama/Llama-3.2-1B", "/data/llama-3.2-1b/")
      True
    """
    return Path(one).name.lower() == Path(other).name.lower()


def _matrices(model: nnx.Module) -> dict[str, Any]:
    """Returns key in the file -> A, B, magnitudes or a whole parameter of the model."""
    modules, sides = lora_modules(model).items(), ("lora_a", "lora_b", "magnitude")
    found = {f"{name}.{side}": getattr(module, side) for name, module in modules for side in sides}
    return {key: matrix for key, matrix in found.items() if matrix is not None} | whole_params(model)
