"""A fine-tuning run, from top to bottom."""

import contextlib
from typing import Any

import jax
import optax
from flax import nnx

from stable_lora_jax.data import (
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
from stable_lora_jax.finetune.config import TrainConfig, fingerprint, parse_mesh
from stable_lora_jax.finetune.loading import load_base
from stable_lora_jax.finetune.run_directory import (
    ADAPTER,
    check_directory,
    exclusive_lock,
    last_start,
    prepare_directory,
)
from stable_lora_jax.lora import inject_lora, save_adapter
from stable_lora_jax.optim.hyperparameters import Number, check_range
from stable_lora_jax.training import (
    TrainResult,
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


def finetune(config: TrainConfig) -> TrainResult:
    """Trains the adapters of a model as `config` says, and returns how it ended; everything is in its run directory.

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
    ours, seen = (config.directory, fingerprint(config), data), last_start(config.directory)
    asked = {"auto_resume": config.auto_resume, "overwrite": config.overwrite}
    resume = check_directory(*ours, resume=config.resume, **asked)
    # What several devices share would not fit the first of them whole, nor beside its part: it stays on the host, from
    # where `train` gives each device its part, and to where it brings the adapters back.
    with jax.default_device(_host(mesh.size) if mesh.size > 1 else None):
        model = load_base(config.model, config.dtype, config.quantize, remat=config.remat, attention=config.attention)
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
    with exclusive_lock(config.directory) if is_first() else contextlib.nullcontext():
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
        if is_first() and not result.stopped_by:
            save_adapter(config.directory / ADAPTER, model, config.model)
    wait_for_all("the adapter is written")
    return result


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
