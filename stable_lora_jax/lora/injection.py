"""Puts LoRA adapters into any Flax NNX model, and folds them back into its weights."""

import math
import re
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from stable_lora_jax.lora.linear import A_INIT, B_INIT, LoRALinear

Model = TypeVar("Model", bound=nnx.Module)

# The paper's names for the modules of a Llama or Qwen2 layer.
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qkvogud": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


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
) -> Model:
    r"""Returns `model`, changed in place: each targeted `nnx.Linear` is now a `LoRALinear` around it.

    Works on any NNX model; a Linear whose kernel is stacked over leading axes gets one adapter per matrix. With the
    default initializers the outputs stay the same to the last bit.

    Args:
      model: holds the Linear layers to adapt, at any depth.
      rank: r >= 1.
      alpha: the scale is s = alpha / rank; > 0.
      targets: "qv", "qkvo" or "qkvogud"; a list of module names or dotted path endings; or a regular expression that
        must match a whole dotted path, e.g. ``r"layers\.mlp\..*"``.
      rngs: random streams for the adapters.
      dtype, use_rslora, dropout, a_init, b_init: as in `LoRALinear`.

    Raises:
      ValueError: nothing, or one of the listed names, matches (the model's Linear layers are listed); rank, alpha or
        dropout out of range; the model has adapters already; it is a Linear layer itself, or has one under two names.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
      >>> model = inject_lora(model, rank=2, alpha=4, targets=r"layers\.0", rngs=nnx.Rngs(2))
      >>> model.layers[0].lora_a.shape, model.layers[0].lora_b.shape
      ((8, 2), (2, 16))
    """
    _check_ranges(rank, alpha, dropout)
    if present := lora_modules(model):
        raise ValueError(
            f"The model has LoRA adapters already, at {_listed(present)}. Adapters are not stacked on adapters: call "
            "merge_lora(model) first, or start from the base model."
        )
    chosen = _matching(linear_modules(model), targets)
    _check_one_name(model, chosen)
    for path, linear in chosen.items():
        adapted = LoRALinear(
            *(linear, rank, alpha),
            rngs=rngs,
            dtype=dtype,
            use_rslora=use_rslora,
            dropout=dropout,
            a_init=a_init,
            b_init=b_init,
        )
        replace_module(model, path, adapted)
    return model


def merge_lora(model: Model) -> Model:
    """Returns `model`, changed in place: every `LoRALinear` is again a Linear, with kernel W + s A B.

    The product is formed in float32 (or wider) and rounded once to the kernel's dtype.

    Raises:
      ValueError: the model has no adapters, or a quantized base, which would round their part away.
    """
    modules = lora_modules(model)
    if not modules:
        raise ValueError("The model has no LoRA adapters to merge. Call inject_lora(model, ...) or load some first.")
    if quantized := [path for path, module in modules.items() if _is_quantized(module.base)]:
        raise ValueError(
            f"The base is quantized at {_listed(quantized)}. Rounding the sum again would lose the adapters: load the "
            "base without quantizing it, load the adapters onto that, and merge there."
        )
    for path, module in modules.items():
        kernel, a, b = module.base.kernel, module.lora_a[...], module.lora_b[...]
        wide = jnp.promote_types(jnp.promote_types(kernel.dtype, a.dtype), jnp.float32)
        delta = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
        kernel[...] = (kernel[...].astype(wide) + module.scale * delta).astype(kernel.dtype)
        replace_module(model, path, module.base)
    return model


def lora_modules(model: nnx.Module) -> dict[str, LoRALinear]:
    """Returns dotted path -> adapted layer, in a fixed order."""
    return {_dotted(path): module for path, module in nnx.iter_modules(model) if isinstance(module, LoRALinear)}


def linear_modules(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Returns dotted path -> Linear layer, in a fixed order."""
    modules = nnx.iter_modules(model)
    return {_dotted(path): module for path, module in modules if isinstance(module, nnx.Linear)}


def _dotted(path: Sequence[object]) -> str:
    return ".".join(map(str, path))


def _matching(linears: dict[str, nnx.Linear], targets: str | Sequence[str]) -> dict[str, nnx.Linear]:
    """Returns the layers that the targets name, each target matching at least one."""
    if isinstance(targets, str) and targets not in TARGETS:
        patterns = {targets: targets}
    else:
        named = TARGETS[targets] if isinstance(targets, str) else targets
        patterns = {name: rf"(?:.*\.)?{re.escape(name)}" for name in named}
    try:
        found = {name: [path for path in linears if re.fullmatch(pattern, path)] for name, pattern in patterns.items()}
    except re.error as error:
        raise ValueError(f"LoRA targets {targets!r} are no regular expression ({error}).") from error
    if missing := [name for name, paths in found.items() if not paths] or ([] if found else ["(no target)"]):
        raise ValueError(
            f"LoRA targets {missing} match no Linear layer. The model's Linear layers are {_listed(linears)}. Targets "
            f"are one of {list(TARGETS)}, a list of names or path endings, or a regular expression for whole paths."
        )
    chosen = {path for paths in found.values() for path in paths}
    return {path: linear for path, linear in linears.items() if path in chosen}


def _check_one_name(model: nnx.Module, chosen: dict[str, nnx.Linear]) -> None:
    """Raises ValueError if one of these layers stands in several places: only one of them would be replaced."""
    names: dict[int, list[str]] = {}
    for path, module in nnx.iter_modules(model):
        for key, child in nnx.iter_children(module):
            names.setdefault(id(child), []).append(_dotted((*path, key)))
    for linear in chosen.values():
        if len(shared := names.get(id(linear), [])) > 1:
            raise ValueError(
                f"{' and '.join(sorted(shared))} are one and the same Linear layer. An adapter would change only one "
                "of them: give each name a layer of its own (nnx.clone), or leave them out of the targets."
            )


def _is_quantized(linear: nnx.Linear) -> bool:
    return not jnp.issubdtype(linear.kernel.dtype, jnp.floating)


def replace_module(model: nnx.Module, path: str, module: nnx.Module) -> None:
    """Puts `module` where `path` leads.

    Raises:
      ValueError: an empty path, which is the model itself.
    """
    if not path:
        raise ValueError(
            f"The model is itself the {type(model).__name__} to change, which cannot be replaced in place. Wrap it: "
            "nnx.Sequential(model)."
        )
    *parents, last = path.split(".")
    node = model
    for key in parents:
        node = _child(node, key)
    if isinstance(node, nnx.List):
        node[int(last)] = module
    else:
        setattr(node, last, module)


def _child(node: nnx.Module, key: str) -> nnx.Module:
    return node[int(key)] if isinstance(node, nnx.List) else getattr(node, key)


def _check_ranges(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank} is not a positive integer. LoRA ranks are 1 or more; 8 is a usual choice.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} is not a positive number. The adapter's scale is alpha / rank; 16 is usual.")
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout={dropout} is not in [0, 1). It is the fraction of inputs dropped; 0 switches it off."
        )


def _listed(paths: Sequence[str] | dict[str, nnx.Linear] | dict[str, LoRALinear], most: int = 40) -> str:
    shown = list(paths)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "") or "none"
