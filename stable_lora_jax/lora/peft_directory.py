"""PEFT directories: adapter_config.json and adapter_model.safetensors, as PEFT 0.21 writes and reads them.

PEFT stores a layer's A as ``base_model.model.<module>.lora_A.weight``: (r, n), and B as ``….lora_B.weight``: (m, r), so
both are transposed here, and adapters stacked over layers are one tensor per layer; magnitudes of DoRA are
``….lora_magnitude_vector``: (m,). An embedding's are ``….lora_embedding_A`` and ``….lora_embedding_B``; next to
adapters of the embedding or the output layer PEFT stores their frozen weights, which must be the model's. The scale
stays in the configuration (lora_alpha, r, use_rslora); it is never multiplied into B.

Modules have other names in a PEFT file than here (``model.layers.3.self_attn.q_proj`` is matrix 3 of
``layers.self_attn.q_proj``). `ModuleName` is that translation; that of our decoders is
`stable_lora_jax.models.huggingface_module`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import save_file

from stable_lora_jax.lora.adapter_file import adapter_spec, same_base
from stable_lora_jax.lora.injection import adaptable_layers, inject_lora, listed, lora_modules
from stable_lora_jax.lora.layer import LoRALayer
from stable_lora_jax.lora.peft_files import CONFIG, MAGNITUDE, WEIGHTS, is_adapted, read_peft
from stable_lora_jax.lora.peft_joined import Joined, PeftModule, join_modules, joined_name, split_tensors
from stable_lora_jax.lora.vocabulary import LoRAEmbed
from stable_lora_jax.lora.whole_modules import whole_params

ModuleName: TypeAlias = Callable[[str, int | None], str]

NOTHING_JOINED: Joined = MappingProxyType({})
_BASE = ".base_layer.weight"
# Of modules that are trained whole: name of a parameter here -> in PyTorch, and its axes without those of a stack.
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_OWN_AXES = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1}


def save_peft(
    directory: str | Path, model: nnx.Module, base: str, module_name: ModuleName, joined: Joined = NOTHING_JOINED
) -> int:
    """Writes the adapters of `model` as a PEFT directory, and returns how many modules it holds.

    Args:
      directory: where to; it is made, and must not hold an adapter yet.
      model: a model with adapters.
      base: written as base_model_name_or_path, e.g. "HuggingFaceTB/SmolLM2-135M-Instruct".
      module_name: from a dotted path here, and the number of the layer or None, to the module's name in transformers.
      joined: last name of a module there that several here are parts of -> theirs, in the order of its output features.

    Raises:
      ValueError: no adapters, some with and some without rslora, or one stacked over several axes; DoRA of some parts
        of a joined module alone, or a part that is trained whole.
      FileExistsError: the directory holds an adapter already.
    """
    directory = Path(directory)
    spec = adapter_spec(model, base)
    modules = lora_modules(model)
    kernels = {path.removesuffix(".base"): _kernel(path, layer) for path, layer in adaptable_layers(model).items()}
    sizes = {
        module_name(path, layer): kernel.shape[-1]
        for path, kernel in kernels.items()
        if kernel.ndim <= 3
        for layer in _layers(kernel)
    }
    each_alone = [each for path, module in modules.items() for each in _matrices(path, module, module_name)]
    everywhere = join_modules(each_alone, joined, sizes, spec.use_rslora)
    # Without an adapter, as in the layers that `layers_to_transform` leaves out: zero, and staying so.
    matrices = [each for each in everywhere if jnp.any(each.a) or jnp.any(each.b)] or everywhere
    embeddings = {module_name(path, None) for path, module in modules.items() if isinstance(module, LoRAEmbed)}
    tensors: dict[str, Any] = {}
    for each in matrices:
        for side, matrix in (("A", each.a), ("B", each.b)):
            tensors[f"base_model.model.{_key(each.name, side, each.name in embeddings)}"] = jnp.asarray(matrix.T)
        if each.magnitude is not None:
            tensors[f"base_model.model.{each.name}.{MAGNITUDE}"] = each.magnitude
    whole: dict[str, None] = {}
    for path, param in whole_params(model).items():
        for name, leaf, value in _parts(path, param, module_name):
            if joined_name(name, joined) != name:
                raise ValueError(
                    f"{name} is trained whole, and is a part of {joined_name(name, joined)} in transformers. Export "
                    "the merged model, or leave it out of modules_to_save."
                )
            tensors[f"base_model.model.{name}.{leaf}"] = value
            whole[re.sub(r".*\.\d+\.", "", name)] = None
    config = {
        "alpha_pattern": {re.escape(each.name): _number(each.alpha) for each in matrices if each.alpha != spec.alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(spec.alpha),
        "lora_dropout": 0.0,
        "modules_to_save": list(whole) or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {re.escape(each.name): each.rank for each in matrices if each.rank != spec.rank},
        "target_modules": _target_modules(
            {each.name for each in matrices}, {joined_name(name, joined) for name in sizes}
        ),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }
    if present := [name for name in (CONFIG, WEIGHTS) if (directory / name).exists()]:
        raise FileExistsError(f"{directory} holds {' and '.join(present)} already. Give a new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return len(matrices)


def inject_peft(
    directory: str | Path, model: nnx.Module, base: str, module_name: ModuleName, joined: Joined = NOTHING_JOINED
) -> int:
    """Injects the adapter of a PEFT directory into `model`, in place, and returns how many modules it filled.

    Args:
      directory: a PEFT directory, also one that `save_peft` wrote.
      model: the base model the adapter was trained on, without adapters.
      base: its name, compared with base_model_name_or_path (see `same_base`).
      module_name, joined: as in `save_peft`.

    Raises:
      ValueError: a file that is missing or damaged; an adapter for another base model; something other than plain
        LoRA (named); modules that the model lacks, or that only some of its layers have though the configuration says
        all (named); matrices of another shape. The model is then unchanged.
    """
    directory = Path(directory)
    config, tensors = read_peft(directory)
    theirs = config.get("base_model_name_or_path")
    if theirs is not None and not isinstance(theirs, str):
        raise ValueError(f"{directory / CONFIG} says base_model_name_or_path={theirs!r}. It must be a text, or null.")
    if theirs and not same_base(theirs, base):
        raise ValueError(
            f"{directory} is an adapter for {theirs}, not for {base}. Load it onto that model; if it is the same model "
            f"under another name, say so in base_model_name_or_path of {CONFIG}."
        )
    # A file names one layer by its number; what is stacked over several axes has no names there.
    layers = adaptable_layers(model)
    kernels = {path: _kernel(path, layer) for path, layer in layers.items()}
    slots = {
        path: [module_name(path, i) for i in _layers(kernel)] for path, kernel in kernels.items() if kernel.ndim <= 3
    }
    sizes = {name: kernels[path].shape[-1] for path, names in slots.items() for name in names}
    tensors = split_tensors(tensors, joined, sizes)
    embeddings = {path for path, layer in layers.items() if path != "lm_head" and isinstance(layer, nnx.Embed)}
    wanted = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    whole, rest = _whole(directory, model, module_name, tensors, config.get("modules_to_save") or [])
    wanted |= rest
    dora = bool(config.get("use_dora"))
    targets = [path for path, names in slots.items() if not wanted.isdisjoint(names)]
    known = {name for path in targets for name in slots[path]}
    if not tensors or wanted - known:
        ours = sorted(name for names in slots.values() for name in names)
        raise ValueError(
            f"{directory} adapts {len(wanted)} modules; the model has no match for "
            f"{listed(sorted(wanted - known), 6)}. Its own are {listed(ours, 6)}. Load it onto the model it was "
            "trained on."
        )
    if lacking := [name for name in known - wanted if is_adapted(config, joined_name(name, joined))]:
        raise ValueError(
            f"{directory} lacks the matrices of {listed(sorted(lacking), 6)}, which its {CONFIG} says are adapted. "
            "Copy it again, or name the layers that are in layers_to_transform."
        )
    if dora and known - wanted:
        raise ValueError(
            f"{directory} uses DoRA in some layers alone: {listed(sorted(known - wanted), 6)} have none. Layers of a "
            "kind are one array here, with magnitudes for all or none."
        )
    names_there = {path: [joined_name(name, joined) for name in slots[path] if name in wanted] for path in targets}
    # Shapes first: nothing changes before everything fits.
    ranks, alphas = (
        {path: _one_value(directory, option, config, names_there[path], default) for path in targets}
        for option, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
    )
    stacks: dict[str, tuple[Any, ...]] = {}
    for path in targets:
        names, shape = slots[path], kernels[path].shape
        present = [name if name in wanted else None for name in names]
        stacks[path] = _stack(directory, path, shape, present, tensors, ranks[path], path in embeddings, dora)
        for name in names:
            _check_base(directory, name, kernels[path], tensors, path in embeddings)
    dtype = jnp.result_type(*(matrix.dtype for each in stacks.values() for matrix in each))  # the widest of all
    inject_lora(
        model,
        config["r"],
        config["lora_alpha"],
        targets,
        rngs=nnx.Rngs(0),
        dtype=dtype,
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={re.escape(path): rank for path, rank in ranks.items()},
        alpha_pattern={re.escape(path): alpha for path, alpha in alphas.items()},
        use_dora=dora,
        modules_to_save=list(dict.fromkeys(path.rpartition(".")[0] for path in whole)),
    )
    for path, param in whole_params(model).items():
        param[...] = whole[path].astype(param.dtype)
    for path, module in lora_modules(model).items():
        module.lora_a[...], module.lora_b[...], *lengths = stacks[path]
        if module.magnitude is not None:
            (module.magnitude[...],) = lengths
    return len(known & wanted)


def _target_modules(adapted: set[str], modules: set[str]) -> list[str]:
    """Returns endings of names where every module of the model that has one is adapted, and else whole names."""
    endings = {name.rsplit(".", 1)[-1] for name in adapted}
    partial = {ending for name in modules - adapted if (ending := name.rsplit(".", 1)[-1]) in endings}
    return sorted({name if (end := name.rsplit(".", 1)[-1]) in partial else end for name in adapted})


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _one_value(directory: Path, option: str, config: Mapping[str, Any], names: list[str], default: Any) -> Any:
    """Returns the rank or alpha of the layers of a kind, which must agree; patterns match as in PEFT."""

    def of(name: str) -> Any:
        pattern = config.get(option) or {}
        key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)
        return default if key is None else pattern[key]

    values = {of(name) for name in names}
    if len(values) > 1:
        raise ValueError(
            f"{directory}: {option} gives {names[0].rpartition('.')[2]} the values {sorted(values)} in different "
            "layers. All layers of a kind need the same here, where they are one stacked array."
        )
    return values.pop()


def _matrices(path: str, module: LoRALayer, module_name: ModuleName) -> list[PeftModule]:
    """Returns the adapter of every matrix of a layer."""
    a, b = module.lora_a[...], module.lora_b[...]
    if a.ndim > 3:
        raise ValueError(
            f"The adapter at {path} is stacked over several axes, A {a.shape} and B {b.shape}. A PEFT directory takes "
            "matrices that stand alone or are stacked over one axis: leave it out of the targets, or use save_adapter."
        )
    magnitude = None if module.magnitude is None else module.magnitude[...]
    if a.ndim == 2:
        return [PeftModule(module_name(path, None), a, b, magnitude, module.rank, module.alpha)]
    lengths = [None] * a.shape[0] if magnitude is None else list(magnitude)
    return [
        PeftModule(module_name(path, i), a[i], b[i], lengths[i], module.rank, module.alpha) for i in range(a.shape[0])
    ]


def _parts(path: str, param: Any, module_name: ModuleName) -> list[tuple[str, str, Any]]:
    """Returns (module in transformers, name of the parameter there, value) of a parameter, layer by layer."""
    module, _, leaf = path.rpartition(".")
    layers = [None] if param.ndim == _OWN_AXES[leaf] else list(range(param.shape[0]))
    values = [param[...]] if layers == [None] else list(param[...])
    if leaf == "kernel":
        values = [value.T for value in values]
    return [(module_name(module, layer), _LEAVES[leaf], value) for layer, value in zip(layers, values, strict=True)]


def _whole(
    directory: Path, model: nnx.Module, module_name: ModuleName, tensors: dict[str, Any], saved: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """Returns path of a parameter -> its value, of the modules that were trained whole, and the keys left over."""
    left = {key for key in tensors if ".lora_" not in key and not key.endswith(_BASE)}
    found: dict[str, Any] = {}
    theirs: set[str] = set()
    params = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for path, param in params.items() if saved and left else ():
        if path.rpartition(".")[2] not in _LEAVES:
            continue
        try:
            parts = _parts(path, param, module_name)
        except ValueError:
            continue  # a module that transformers does not have
        keys = [f"{name}.{leaf}" for name, leaf, _ in parts]
        if left.issuperset(keys):
            values = [_tensor(directory, tensors, key) for key in keys]
            shapes = {value.shape for value in values} - {parts[0][2].shape}
            if shapes:
                raise ValueError(f"{directory}: {keys[0]} has {sorted(shapes)[0]}, the model {parts[0][2].shape}.")
            values = [value.T if path.endswith(".kernel") else value for value in values]
            found[path] = jnp.asarray(np.stack(values).reshape(param.shape))
            left -= set(keys)
            theirs |= {name for name, _, _ in parts}
    if lacking := [name for name in saved if not any(each.endswith(name) for each in theirs)]:
        raise ValueError(
            f"{directory / CONFIG} says modules_to_save={saved}, but {WEIGHTS} or the model has nothing of "
            f"{', '.join(lacking)}. Copy the directory again, or load it onto the model that it was trained on."
        )
    return found, left


def _layers(kernel: Any) -> list[int | None]:
    return [None] if kernel.ndim == 2 else list(range(kernel.shape[0]))


def _kernel(path: str, layer: nnx.Linear | nnx.Embed) -> Any:
    """Returns what an adapter of this layer is added to: the embedding transposed for an output layer that is one."""
    if isinstance(layer, nnx.Linear):
        return layer.kernel
    return layer.embedding[...].T if path == "lm_head" else layer.embedding


def _key(name: str, side: str, embedding: bool) -> str:
    return f"{name}.lora_embedding_{side}" if embedding else f"{name}.lora_{side}.weight"


def _check_base(directory: Path, name: str, kernel: Any, tensors: dict[str, Any], embedding: bool) -> None:
    """Raises ValueError if a directory holds another frozen weight of a module, as after resizing a vocabulary."""
    if (theirs := tensors.get(f"{name}{_BASE}")) is None:
        return
    ours = kernel[...] if embedding else kernel[...].T
    coarser = min(theirs.dtype, ours.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    if theirs.shape != ours.shape or not jnp.array_equal(theirs.astype(coarser), ours.astype(coarser)):
        raise ValueError(
            f"{directory} holds a frozen weight of {name} {theirs.shape} that is not the model's {ours.shape}: the "
            "adapter was trained on a base that had been changed, such as by more tokens. Load it onto that base."
        )


def _stack(
    directory: str | Path,
    path: str,
    shape: tuple[int, ...],
    names: list[str | None],
    tensors: dict[str, Any],
    rank: int,
    embedding: bool,
    dora: bool,
) -> tuple[Any, ...]:
    """Returns A and B of one of our layers, and the magnitudes if it is DoRA's, checked against its kernel.

    A layer without a name has no adapter: zeros.
    """
    named = [name for name in names if name]
    stored = {side: [_tensor(directory, tensors, _key(name, side, embedding)) for name in named] for side in "AB"}
    for side, matrices in stored.items():
        if shapes := {matrix.shape for matrix in matrices if matrix.ndim != 2 or matrix.shape != matrices[0].shape}:
            raise ValueError(
                f"{path}: {directory} has lora_{side} of the shapes {sorted({matrices[0].shape, *shapes})}. All layers "
                "of a kind need matrices of one shape."
            )
    empty = {side: np.zeros_like(stored[side][0]) for side in "AB"}
    a, b = (np.stack([matrix.T for matrix in _in_places(names, stored[side], empty[side])]) for side in "AB")
    if len(shape) == 2:
        a, b = a[0], b[0]
    *stack, fan_in, fan_out = shape
    expected = (*stack, fan_in, rank), (*stack, rank, fan_out)
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"{path}: {directory} has A {a.shape} and B {b.shape}, the model needs {expected[0]} and {expected[1]}. "
            "The adapter was trained on a model of another size, or its r is not the one in its configuration."
        )
    if not dora:
        return jnp.asarray(a), jnp.asarray(b)
    lengths = [_tensor(directory, tensors, f"{name}.{MAGNITUDE}") for name in named]
    if any(each.shape != (fan_out,) for each in lengths):
        raise ValueError(
            f"{path}: {directory} has magnitudes of the shapes {[each.shape for each in lengths]}, the model needs "
            f"({fan_out},). The adapter was trained on a model of another size."
        )
    return jnp.asarray(a), jnp.asarray(b), jnp.asarray(np.stack(lengths).reshape(*stack, fan_out))


def _in_places(names: list[str | None], found: list[np.ndarray], empty: np.ndarray) -> list[np.ndarray]:
    rest = iter(found)
    return [next(rest) if name else empty for name in names]


def _tensor(directory: str | Path, tensors: dict[str, Any], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{directory} lacks the tensor {name}. The file is not complete.")
    return np.asarray(tensors[name])
