"""The two files of a PEFT directory, read and checked: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"
# A key as PEFT has it in memory, with the adapter's name in it, which is mostly "default".
_NAMED = re.compile(rf"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|{MAGNITUDE})\.(?!weight$)(\w+)(\.weight)?$")

# What PEFT 0.21 can train and this library cannot hold, with the values that mean "not used". Of the initializations,
# those not listed (pissa, olora, corda, loftq, lora_ga) change the base weight, to which A and B then belong.
_UNUSED = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "ensure_weight_tying": (False, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "use_qalora": (False, None),
}


def read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configuration, and the tensors without the prefix and the adapter's name that PEFT may give them.

    Raises:
      ValueError: a file that is missing or damaged, something other than plain LoRA (named), a value of another kind
        or out of range, a tensor that is there twice, is not of floating numbers or not finite.
    """
    if missing := [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]:
        inside = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))  # of adapters with names
        raise ValueError(
            f"{directory} lacks {' and '.join(missing)}. Give the directory that PEFT's save_pretrained wrote"
            + (f", one of {', '.join(inside)}." if inside else ".")
        )
    try:
        config = dict(json.loads((directory / CONFIG).read_text()))
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{directory} is damaged ({error}); copy it again.") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory} holds a {config.get('peft_type')} adapter. Only LORA can be loaded.")
    if used := [name for name, unused in _UNUSED.items() if name in config and config[name] not in unused]:
        told = ", ".join(f"{name}={config[name]!r}" for name in used)
        raise ValueError(f"{directory} uses {told}. Only plain LoRA can be loaded.")
    if missing := [name for name in ("r", "lora_alpha") if config.get(name) is None]:
        raise ValueError(f"{directory / CONFIG} lacks {' and '.join(missing)}. Add them as they were in training.")
    for name, kinds, kind in (("r", (int,), "integer"), ("lora_alpha", (int, float), "number")):
        value = config[name]
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= 2**31:
            raise ValueError(
                f"{directory / CONFIG} says {name}={value!r}. It must be a positive {kind}, written without quotes. "
                "Correct it as it was in training."
            )
    _check_patterns(directory, config)
    _check_targets(directory, config)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ValueError(f"{directory / CONFIG} says modules_to_save={saved!r}. It must be a list of names, or null.")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name) or False, bool):
            raise ValueError(f"{directory / CONFIG} says {name}={config[name]!r}. It must be true or false.")
    return config, _plain_names(directory, tensors)


def is_adapted(config: Mapping[str, Any], name: str) -> bool:
    """Returns whether a configuration says that a module has an adapter, as PEFT 0.21 decides."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _named(excluded, name):
        return False
    if targets is None or isinstance(targets, str):
        return targets is None or bool(re.fullmatch(targets, name))
    if name in targets:
        return True
    layers = config.get("layers_to_transform")
    if not _named(targets, name) or layers is None or layers == []:
        return _named(targets, name)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(endings: Any, name: str) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _check_targets(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless `is_adapted` can read what the configuration says of its targets."""
    for option in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"):
        value = config.get(option)
        kind = int if option == "layers_to_transform" else str
        entries = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in entries):
            raise ValueError(
                f"{directory / CONFIG} says {option}={value!r}. It must be a list of {kind.__name__}, one, or null."
            )
        try:
            for entry in entries if option == "layers_pattern" or isinstance(value, str) else ():
                re.compile(entry)
        except re.error as error:
            raise ValueError(
                f"{directory / CONFIG}: {option} holds {value!r}, no regular expression ({error})."
            ) from error


def _check_patterns(directory: Path, config: Mapping[str, Any]) -> None:
    for option, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        pattern = config.get(option) or {}
        values = pattern.values() if isinstance(pattern, dict) else [None]
        if any(not isinstance(each, kinds) or isinstance(each, bool) or not 0 < each <= 2**31 for each in values):
            raise ValueError(
                f"{directory / CONFIG} says {option}={pattern!r}. It must map patterns to positive numbers. Correct it "
                "as it was in training."
            )
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(
                    f"{directory / CONFIG}: {option} holds {key!r}, no regular expression ({error})."
                ) from error


def _plain_names(directory: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors without the prefix and the adapter's name that PEFT's keys have in some versions."""
    plain: dict[str, Any] = {}
    adapters = {match[2] for key in tensors if (match := _NAMED.search(key))}
    if len(adapters) > 1:
        raise ValueError(
            f"{directory} holds the adapters {', '.join(sorted(adapters))} in one file. Keep one: save_pretrained "
            "writes each into a directory of its own."
        )
    for key, tensor in tensors.items():
        name = _NAMED.sub(r".\1\3", key.removeprefix("base_model.model."))
        name = name.replace(f".{MAGNITUDE}.weight", f".{MAGNITUDE}")
        if name in plain:
            raise ValueError(f"{directory} holds the tensor {name} twice, once as {key}. Keep one of them.")
        if not np.issubdtype(tensor.dtype, np.floating) and not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{directory}: the tensor {key} is {tensor.dtype}. Adapters are floating numbers.")
        if not jnp.isfinite(tensor).all():
            raise ValueError(
                f"{directory}: the tensor {key} holds NaN or infinity. The training that wrote it has failed: give an "
                "earlier checkpoint, or copy the file again."
            )
        plain[name] = tensor
    return plain
