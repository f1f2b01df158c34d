"""Puts LoRA adapters into any Flax NNX model, and folds them back into its weights."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from stable_lora_jax.lora.layer import A_INIT, B_INIT, LoRALayer
from stable_lora_jax.lora.linear import LoRALinear
from stable_lora_jax.lora.orthogonal import orthogonal_start
from stable_lora_jax.lora.vocabulary import LoRAEmbed, LoRATiedHead, tied_embedding
from stable_lora_jax.lora.whole_modules import freeze_whole, train_whole

Model = TypeVar("Model", bound=nnx.Module)
Kind = TypeVar("Kind", bound=nnx.Module)
Path: TypeAlias = tuple[Any, ...]

_CONTAINERS = (nnx.List, nnx.Dict, list, tuple, dict)

# The paper's names for the modules of a layer.
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qkvogud": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


# Every Linear layer but the output layer, as in PEFT.
ALL_LINEAR = "all-linear"
STARTS = ("b-zero", "orthogonal")
# Where a decoder keeps its output layer.
_HEAD = ("lm_head",)


def inject_lora(
    model: Model,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    use_rslora: bool = False,
    dropout: float = 0.0,
    a_init: Initializer = A_INIT,
    b_init: Initializer = B_INIT,
    a_scale: float = 1.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    use_dora: bool = False,
    modules_to_save: Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    start: str = "b-zero",
) -> Model:
    r"""Returns `model`, changed in place: each targeted `nnx.Linear` is now a `LoRALinear` around it.

    Works on any NNX model; a Linear whose kernel is stacked over leading axes gets one adapter per matrix. With the
    default initializers the outputs stay the same to the last bit. An `nnx.Embed` that is listed becomes a `LoRAEmbed`;
    so does `lm_head` of a decoder whose embedding is its output layer (`LoRATiedHead`).

    Args:
      model: holds the layers to adapt, at any depth.
      rank: r >= 1.
      alpha: the scale is s = alpha / rank; > 0.
      targets: "qv", "qkvo" or "qkvogud"; "all-linear", every Linear but the output layer `lm_head`; a list of dotted
        paths, or a text with commas between them, each of which is a whole path or else the ending of any number of
        paths, e.g. "q_proj,embed_tokens,lm_head"; or a regular expression that must match a whole dotted path of
        Linear layers, e.g. ``r"layers\.mlp\..*"``.
      rngs: random streams for the adapters.
      dtype, use_rslora, dropout, a_init, b_init: as in `LoRALayer`; an embedding takes the first two.
      a_scale: the start of every A is multiplied by it; > 0. A start of 1/4 to 1/16 of the size does in some settings
        what the shrink of Stable-LoRA does.
      rank_pattern, alpha_pattern: other ranks and alphas for some layers, as PEFT has them: a regular expression for
        a path or the ending of one after a dot -> value; the first that matches counts.
      exclude: targets that are left out, each as in a list of targets.
      use_dora: train the magnitude of every column too (DoRA); as in `LoRALinear`.
      modules_to_save: modules that are trained whole, such as "norm" or "lm_head"; see `train_whole`.
      layers_to_transform: of layers that are stacked, the numbers of those that get an adapter. The others' A and B are
        zero, which no gradient changes: each one's gradient is a product with the other.
      start: one of `STARTS`: "b-zero", what `a_init` and `b_init` draw; "orthogonal", for Linear layers and output
        layers of an even rank (see `stable_lora_jax.lora.orthogonal`).

    Raises:
      ValueError: nothing, or one of the listed names, matches (the model's layers are listed), which holds for
        patterns and what is left out too; rank, alpha, dropout or a_scale out of range; an unknown start, or an odd
        rank with "orthogonal"; the model has adapters already, ours or another library's; it is a Linear layer itself,
        or has one under two names or in a tuple; DoRA for an embedding; layers that a target does not have, or with
        DoRA, whose magnitudes would be trained in all. The model is then unchanged.

    Examples:
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
      >>> model = inject_lora(model, rank=2, alpha=4, targets=r"layers\.0", rngs=nnx.Rngs(2))
      >>> model.layers[0].lora_a.shape, model.layers[0].lora_b.shape
      ((8, 2), (2, 16))
    """
    if not 0 < a_scale < math.inf:
        raise ValueError(f"a_scale={a_scale} is not a positive number. It multiplies the start of A; 1 leaves it.")
    if start not in STARTS:
        raise ValueError(f"start={start!r} is unknown. Known: {', '.join(STARTS)}.")
    if present := adapted_paths(model):
        raise ValueError(
            f"The model has LoRA adapters already, at {listed(present)}. Adapters are not stacked on adapters: call "
            "merge_lora(model) first, or start from the base model."
        )
    layers = _adaptable(model)
    chosen = _matching(layers, targets)
    if exclude:
        left_out = _matching(layers, list(exclude))
        chosen = {path: layer for path, layer in chosen.items() if path not in left_out}
        if not chosen:
            raise ValueError(f"exclude={list(exclude)} leaves nothing of the targets {targets!r}. Leave less out.")
    ranks = _by_pattern("rank_pattern", rank_pattern or {}, chosen, rank)
    alphas = _by_pattern("alpha_pattern", alpha_pattern or {}, chosen, alpha)
    check_one_name(model, chosen.values())
    if use_dora and (no_dora := [dotted(path) for path, layer in chosen.items() if isinstance(layer, nnx.Embed)]):
        raise ValueError(f"DoRA is not for {listed(no_dora)}: it has no columns of its own. Leave one of them out.")
    places = [place(model, path) for path in chosen]
    if both := [name for path in chosen for name in modules_to_save if re.fullmatch(_ending(name), dotted(path))]:
        raise ValueError(f"{listed(dict.fromkeys(both))} are targets and modules_to_save. Leave them out of one.")
    if layers_to_transform is not None:
        _check_layers(chosen, layers_to_transform, use_dora)
    of_all: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "use_rslora": use_rslora}
    of_linears = of_all | {"dropout": dropout, "a_init": a_init, "b_init": b_init}

    def adapted(path: Path, layer: nnx.Linear | nnx.Embed) -> LoRALayer:
        if isinstance(layer, nnx.Linear):
            return LoRALinear(layer, ranks[path], alphas[path], use_dora=use_dora, **of_linears)
        if path == _HEAD:
            return LoRATiedHead(layer, ranks[path], alphas[path], **of_linears)
        return LoRAEmbed(layer, ranks[path], alphas[path], **of_all)

    modules = [adapted(path, layer) for path, layer in chosen.items()]
    for module in modules if start == "orthogonal" else ():
        if not isinstance(module, LoRAEmbed):
            shape, kept = (*module.lora_a.shape[:-1], module.lora_b.shape[-1]), module.lora_a.dtype
            module.lora_a[...], module.lora_b[...] = orthogonal_start(rngs.params(), shape, module.rank, kept)
    train_whole(model, modules_to_save, dtype)
    for put, module in zip(places, modules, strict=True):
        if a_scale != 1:
            module.lora_a[...] = jnp.asarray(a_scale, module.lora_a.dtype) * module.lora_a[...]
        if layers_to_transform is not None:
            for param in (module.lora_a, module.lora_b):
                at = jnp.isin(jnp.arange(param.shape[0]), jnp.array(layers_to_transform))
                param[...] = jnp.where(at[:, None, None], param[...], 0)
        put(module)
    return model


def merge_lora(model: Model) -> Model:
    """Returns `model`, changed in place: every adapted layer is again what it was, with kernel W + s A B.

    With DoRA the columns of that sum are rescaled. It is formed in float32 (or wider) and rounded once to the
    kernel's dtype. Modules that were trained whole are frozen in their own dtype. A tied embedding, or output layer,
    that has an adapter becomes two weights.

    Raises:
      ValueError: the model has no adapters, a quantized base, which would round their part away, or is itself an
        adapted layer; or it has an adapted embedding, and nothing that says whether this is its output layer too (an
        `lm_head`, and a method `untie` where that is None). The model is then unchanged.
    """
    modules = modules_at(model, LoRALayer)
    if not modules:
        raise ValueError("The model has no LoRA adapters to merge. Call inject_lora(model, ...) or load some first.")
    linears = {path: module for path, module in modules.items() if isinstance(module, LoRALinear)}
    if quantized := [dotted(path) for path, module in linears.items() if _is_quantized(module.base)]:
        raise ValueError(
            f"The base is quantized at {listed(quantized)}. Rounding the sum again would lose the adapters: load the "
            "base without quantizing it, load the adapters onto that, and merge there."
        )
    places = {path: place(model, path) for path in modules}
    if len(linears) < len(modules) and tied_embedding(model) is not None:
        _untie(model)
        modules = modules_at(model, LoRALayer)  # an adapter of the output layer is around its new weight now
    elif len(linears) < len(modules) and not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} has an adapted embedding and no lm_head, so nothing says whether the embedding is "
            "the output layer too, which merging would change. Merge the other layers alone, without this adapter."
        )
    for path, module in modules.items():
        if isinstance(module, LoRALinear | LoRAEmbed):
            places[path](module.merged())
    freeze_whole(model)
    return model


def _untie(model: Any) -> None:
    """Gives a model with a tied output layer one of its own, around which that layer's adapter is put."""
    untie, adapter = getattr(model, "untie", None), getattr(model, "lm_head", None)
    if untie is None:
        raise ValueError(
            f"{type(model).__name__} has one weight for its embedding and its output layer, of which one has an "
            "adapter. To be merged it needs a method untie(), which makes lm_head a Linear of its own."
        )
    untie()
    if isinstance(adapter, LoRATiedHead):
        linear = LoRALinear(model.lm_head, adapter.rank, adapter.alpha, rngs=nnx.Rngs(0), use_rslora=adapter.use_rslora)
        linear.lora_a, linear.lora_b = adapter.lora_a, adapter.lora_b
        model.lm_head = linear


def lora_modules(model: nnx.Module) -> dict[str, LoRALayer]:
    """Returns dotted path -> adapted layer, in a fixed order."""
    return {dotted(path): module for path, module in modules_at(model, LoRALayer).items()}


def adapted_paths(model: nnx.Module) -> list[str]:
    """Returns the dotted paths of all modules that hold LoRA matrices, whichever library made them."""
    matrices = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    return list(dict.fromkeys(dotted(path[:-1]) for path, _ in matrices))


def adaptable_layers(model: nnx.Module) -> dict[str, nnx.Linear | nnx.Embed]:
    """Returns dotted path -> layer that can have an adapter, in a fixed order; a tied `lm_head` is the embedding."""
    return {dotted(path): layer for path, layer in _adaptable(model).items()}


def _adaptable(model: nnx.Module) -> dict[Path, nnx.Linear | nnx.Embed]:
    tied = tied_embedding(model)
    layers: dict[Path, nnx.Linear | nnx.Embed] = {**modules_at(model, nnx.Linear), **modules_at(model, nnx.Embed)}
    return layers | ({_HEAD: tied} if isinstance(tied, nnx.Embed) else {})


def modules_at(model: nnx.Module, kind: type[Kind]) -> dict[Path, Kind]:
    """Returns path -> module of a kind, in a fixed order. The parts of a path may be numbers, or hold dots."""
    return {tuple(path): module for path, module in nnx.iter_modules(model) if isinstance(module, kind)}


def dotted(path: Iterable[object]) -> str:
    """Returns a path as it is shown and matched."""
    return ".".join(map(str, path))


def _ending(name: str) -> str:
    return rf"(?:.*\.)?{re.escape(name)}"


def _matching(
    layers: dict[Path, nnx.Linear | nnx.Embed], targets: str | Sequence[str]
) -> dict[Path, nnx.Linear | nnx.Embed]:
    """Returns the layers that the targets name, each target matching at least one; expressions match Linear layers."""
    if isinstance(targets, str) and targets not in TARGETS and re.fullmatch(r"\w+(\.\w+)*(,\w+(\.\w+)*)*", targets):
        targets = targets.split(",")
    named = not isinstance(targets, str)
    whole = {path: dotted(path) for path, layer in layers.items() if named or isinstance(layer, nnx.Linear)}
    if not isinstance(targets, str):
        patterns = {name: re.escape(name) if name in whole.values() else _ending(name) for name in targets}
    elif targets == ALL_LINEAR:
        patterns = {targets: rf"(?!{_ending('lm_head')}$).*"}
    elif targets in TARGETS:
        patterns = {name: _ending(name) for name in TARGETS[targets]}
    else:
        patterns = {targets: targets}
    try:
        found = {key: [at for at, name in whole.items() if re.fullmatch(each, name)] for key, each in patterns.items()}
    except re.error as error:
        raise ValueError(f"LoRA targets {targets!r} are no regular expression ({error}).") from error
    if missing := [name for name, paths in found.items() if not paths] or ([] if found else ["(no target)"]):
        raise ValueError(
            f"LoRA targets {missing} match no {'' if named else 'Linear '}layer. The model's are "
            f"{listed(whole.values())}. Targets are one of {[*TARGETS, ALL_LINEAR]}, a list of paths or path endings "
            "(also of embeddings), these with commas between them, or a regular expression for whole paths of Linear "
            "layers."
        )
    chosen = {path for paths in found.values() for path in paths}
    return {path: layer for path, layer in layers.items() if path in chosen}


def _by_pattern(option: str, pattern: Mapping[str, Any], chosen: Iterable[Path], default: Any) -> dict[Path, Any]:
    """Returns each layer's value: that of the first pattern that matches its path, or an ending of it."""
    values, used = {}, set()
    for path in chosen:
        try:
            keys = (key for key in pattern if re.fullmatch(rf"(?:.*\.)?(?:{key})", dotted(path)))
            key = next(keys, None)
        except re.error as error:
            raise ValueError(
                f"{option}={dict(pattern)!r} holds no regular expression ({error}). Correct it."
            ) from error
        used.add(key)
        values[path] = default if key is None else pattern[key]
    if unused := [key for key in pattern if key not in used]:
        raise ValueError(
            f"{option}={dict(pattern)!r}: {unused} decide nothing; they match none of the targets, or others match "
            f"before them. The targets are {listed(dotted(path) for path in values)}."
        )
    return values


def _check_layers(chosen: Mapping[Path, nnx.Linear | nnx.Embed], layers: Sequence[int], use_dora: bool) -> None:
    """Raises ValueError unless every target is a stack that has these layers."""
    if use_dora:
        raise ValueError("layers_to_transform and use_dora: magnitudes would be trained in all layers. Leave one out.")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers_to_transform={list(layers)} must name at least one layer, and each once.")
    for path, layer in chosen.items():
        count = layer.kernel.shape[0] if isinstance(layer, nnx.Linear) and layer.kernel.ndim == 3 else 0
        if not all(0 <= number < count for number in layers):
            raise ValueError(
                f"layers_to_transform={list(layers)}: {dotted(path)} "
                + (f"has the layers 0 to {count - 1}." if count else "is not a stack of layers; leave it out.")
            )


def check_one_name(model: nnx.Module, chosen: Iterable[nnx.Module]) -> None:
    """Raises ValueError if one of these layers stands in several places: only one of them would be replaced."""
    names: dict[int, list[str]] = {}
    for path, module in nnx.iter_modules(model):
        # Not nnx.iter_children, which passes over lists, tuples and dicts of Python.
        children = jax.tree_util.tree_leaves_with_path(vars(module), is_leaf=lambda x: isinstance(x, nnx.Module))
        for keys, child in children:
            below = jax.tree_util.keystr(keys, simple=True, separator=".")
            names.setdefault(id(child), []).append(dotted((*path, below)))
    for layer in chosen:
        if len(shared := names.get(id(layer), [])) > 1:
            raise ValueError(
                f"{' and '.join(sorted(shared))} are one and the same layer, of which only one would be "
                "replaced: give each name a layer of its own (nnx.clone), or leave them out of the targets."
            )


def _is_quantized(linear: nnx.Linear) -> bool:
    return not jnp.issubdtype(linear.kernel.dtype, jnp.floating)


def place(model: nnx.Module, path: Path) -> Callable[[nnx.Module], None]:
    """Returns a function that puts a module where `path` leads.

    Raises:
      ValueError: an empty path, which is the model itself, or one into a tuple.
    """
    if not path:
        raise ValueError(
            f"The model is itself the {type(model).__name__} to change, which cannot be replaced in place. Wrap it: "
            "nnx.Sequential(model)."
        )
    *parents, last = path
    node: Any = model
    for key in parents:
        node = node[key] if isinstance(node, _CONTAINERS) else getattr(node, key)
    if isinstance(node, tuple):
        raise ValueError(
            f"{dotted(path)} stands in a tuple, whose entries cannot be replaced. Keep these layers in an nnx.List."
        )

    indexed = isinstance(node, _CONTAINERS)

    def put(module: nnx.Module) -> None:
        if indexed:
            node[last] = module
        else:
            setattr(node, last, nnx.data(module))  # also where None was, as a tied output layer is

    return put


def listed(paths: Iterable[str], most: int = 40) -> str:
    """Returns paths for a message, the first `most` of them."""
    shown = list(paths)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "") or "none"
