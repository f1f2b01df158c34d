"""Modules that are trained whole next to adapters, such as norms or an output layer: PEFT's modules_to_save."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stable_lora_jax.lora.vocabulary import tied_embedding


class WholeParam(nnx.LoRAParam):
    """A parameter of a module that is trained whole; a LoRAParam, so that all that finds adapters finds it."""


def train_whole(model: nnx.Module, modules: Sequence[str], dtype: DTypeLike = jnp.float32) -> None:
    """Makes every parameter of some modules a `WholeParam`, in place; their values stay.

    Args:
      model: holds the modules, which keep the dtype that they compute in.
      modules: dotted paths, each of which is a whole path or else the ending of any number of paths.
      dtype: that the parameters are kept in.

    Raises:
      ValueError: a name that no module with parameters of its own has (those are listed), an adapted or a quantized
        layer, or an embedding that is the output layer too. The model is then unchanged.
    """
    at = dict(_with_params(model))
    chosen: dict[str, nnx.Module] = {}
    for name in modules:
        found = {path: at[path] for path in at if path == name}
        found = found or {path: each for path, each in at.items() if re.fullmatch(rf"(?:.*\.)?{re.escape(name)}", path)}
        if not found:
            raise ValueError(
                f"modules_to_save: no module with parameters is called {name!r}, but {', '.join(list(at)[:40])}."
            )
        chosen |= found
    for path, module in chosen.items():
        params = _params_of(module)
        if path.endswith(".base") or any(isinstance(each, nnx.LoRAParam) for each in params.values()):
            raise ValueError(f"modules_to_save: {path} has an adapter. Leave it out of the targets, or out of here.")
        if not all(jnp.issubdtype(each.dtype, jnp.floating) for each in params.values()):
            raise ValueError(f"modules_to_save: {path} is quantized. Load the base without quantizing it.")
        if module is tied_embedding(model):
            raise ValueError(
                f"modules_to_save: {path} is the output layer too, and PEFT would train a copy that is not. Leave it "
                "out."
            )
    for module in chosen.values():
        for leaf, param in _params_of(module).items():
            setattr(module, leaf, WholeParam(param[...].astype(dtype)))


def whole_params(model: nnx.Module) -> dict[str, WholeParam]:
    """Returns dotted path -> parameter that is trained whole, in a fixed order."""
    flat = nnx.to_flat_state(nnx.state(model, WholeParam))
    return {".".join(map(str, path)): variable for path, variable in flat}


def whole_modules(model: nnx.Module) -> list[str]:
    """Returns the dotted paths of the modules that are trained whole."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in whole_params(model)))


def freeze_whole(model: nnx.Module) -> None:
    """Makes every `WholeParam` a plain Param again, in place, in the dtype that its module has for parameters."""
    for _, module in _with_params(model):
        for leaf, param in _params_of(module).items():
            if isinstance(param, WholeParam):
                setattr(module, leaf, nnx.Param(param[...].astype(getattr(module, "param_dtype", param.dtype))))


def _with_params(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for path, module in nnx.iter_modules(model):
        if path and _params_of(module):
            yield ".".join(map(str, path)), module


def _params_of(module: nnx.Module) -> dict[str, Any]:
    """Returns name -> parameter, of those that a module holds itself."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
