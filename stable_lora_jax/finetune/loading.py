"""Adapters as commands are given them: a run directory, a file, or a PEFT directory; and the base that they go onto."""

import sys
from pathlib import Path
from typing import Any

from flax import nnx

from stable_lora_jax.finetune.config import (
    DTYPES,
    AdapterConfig,
    ModelConfig,
    check_choice,
    layer_numbers,
    numbers_by_module,
    options_of,
)
from stable_lora_jax.locations import Location, location
from stable_lora_jax.lora import inject_lora, inject_peft, load_adapter, quantize_linears, read_adapter_spec, same_base
from stable_lora_jax.lora.peft_files import CONFIG as PEFT_CONFIG
from stable_lora_jax.models import Decoder, huggingface_module, joined_modules, load_model
from stable_lora_jax.models.huggingface import read_json
from stable_lora_jax.training import RunDirectory

# The names under which others know what an alias of ours stands for.
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def base_of(given: str | None, adapter: Path | None) -> str:
    """Returns the name of the base to load: as given, or the one that the adapter names, or the default."""
    if given or adapter is None:
        return given or ModelConfig.name
    if (adapter / PEFT_CONFIG).is_file():
        named = read_json(adapter / PEFT_CONFIG).get("base_model_name_or_path") or ModelConfig.name
        return next((alias for alias, name in HUB_NAMES.items() if name == named), named)
    return read_adapter_spec(adapter_file(adapter)).base


def quantization(given: str | None, adapter: Path | None) -> str | None:
    """Returns how to quantize the base: as given, or as the adapter's run did; None for not at all."""
    chosen = given_or_trained("quantize", given, adapter, "none")
    return None if chosen == "none" else chosen


def given_or_trained(field: str, given: str | None, adapter: Path | None, default: str) -> str:
    """Returns a option as given, or as in an adapter's run, and tells if the two differ."""
    run = options_of(record_of(adapter).get("config", {}))
    trained = run.get(field) or default
    if given is not None and run and given != trained:
        print(f"{field}: {given} as given; {adapter} was trained with {trained}", file=sys.stderr)
    return trained if given is None else given


def record_of(adapter: Path | None) -> dict[str, Any]:
    """Returns the config.json of the run that an adapter lies in; nothing if it lies in none."""
    if adapter is None:
        return {}
    return RunDirectory(adapter_file(adapter).parent).record()


def adapter_file(adapter: Location) -> Location:
    """Returns the file of an adapter that may be given as its run directory.

    Raises:
      ValueError: the run has not come to its end.
    """
    run, adapter = RunDirectory(adapter), location(adapter)
    if run.is_started:
        raise ValueError(
            f"The run in {adapter} has no adapter yet: it was stopped, or still trains. Resume it by `train "
            "--resume` and the values that it was started with."
        )
    return run.adapter if adapter.is_dir() else adapter


def load_with_adapter(
    name: str,
    adapter: Path | None,
    dtype: str = "float32",
    quantize: str | None = None,
    base: Decoder | None = None,
) -> Decoder:
    """Returns a base model, with the adapter of a run directory, a PEFT directory or a file if one is given.

    Args:
      name: of the base, as `load_model` takes it.
      adapter: the adapter, if any.
      dtype: of the base, a key of `DTYPES`.
      quantize: int8, nf4 or None.
      base: that base, where it is loaded already: it gets the adapter.

    Raises:
      ValueError: an adapter that belongs to another base model; an unknown dtype or quantization.
    """
    check_choice("dtype", dtype, tuple(DTYPES))
    if adapter is None:
        return base or load_base(name, dtype, quantize)
    if (adapter / PEFT_CONFIG).is_file():
        model = base or load_base(name, dtype, quantize)
        joined = joined_modules(model.config.model_type)
        count = inject_peft(adapter, model, HUB_NAMES.get(name, name), huggingface_module, joined)
        print(f"{adapter}: filled {count} modules", file=sys.stderr)
        return model
    file = adapter_file(adapter)
    spec = read_adapter_spec(file)
    if not same_base(spec.base, name):
        raise ValueError(
            f"The adapter {file} does not belong to this model (base: file {spec.base!r}, model {name!r}). Load it "
            "onto its own base, or a copy of that in a directory of the same name."
        )
    model = base or load_base(name, dtype, quantize)
    inject_lora(
        model,
        spec.rank,
        spec.alpha,
        spec.targets,
        rngs=nnx.Rngs(0),
        use_rslora=spec.use_rslora,
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
        use_dora=spec.use_dora,
        modules_to_save=spec.whole,
    )
    load_adapter(file, model, name)
    if spec.base != name:
        print(f"{file}: trained on {spec.base}, loaded onto {name}", file=sys.stderr)
    return model


def inject_adapters(model: Decoder, adapter: AdapterConfig, seed: int) -> Decoder:
    """Returns the model with the adapters of a configuration, changed in place; see `inject_lora`."""
    return inject_lora(
        model,
        adapter.rank,
        adapter.alpha,
        adapter.targets,
        rngs=nnx.Rngs(seed),
        use_rslora=adapter.use_rslora,
        dropout=adapter.dropout,
        start=adapter.start,
        a_scale=adapter.a_scale,
        use_dora=adapter.use_dora,
        modules_to_save=adapter.modules_to_save.split(",") if adapter.modules_to_save else (),
        rank_pattern=numbers_by_module("rank_pattern", adapter.rank_pattern),
        alpha_pattern=numbers_by_module("alpha_pattern", adapter.alpha_pattern),
        exclude=adapter.exclude.split(",") if adapter.exclude else (),
        layers_to_transform=layer_numbers(adapter.layers_to_transform),
    )


def load_base(name: str, dtype: str, quantize: str | None, **options: Any) -> Decoder:
    """Returns a base model: a dtype of `DTYPES`, int8, nf4 or None, and else what `load_model` takes."""
    model = load_model(name, dtype=DTYPES[dtype], param_dtype=DTYPES[dtype], **options)
    return quantize_linears(model, quantize) if quantize else model
