"""A fine-tuning run, from top to bottom."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from stable_lora_jax.data import (
    TASKS,
    Conversation,
    Encoded,
    PackedBatches,
    Question,
    TrainBatches,
    check_fits,
    digest,
    encode_all,
    fit,
    hold_out,
    load_hub,
    load_jsonl,
    load_task,
    load_tokenizer,
    parse_columns,
    right_branch_only,
)
from stable_lora_jax.finetune.config import RunConfig, fingerprint
from stable_lora_jax.finetune.execution import parse_mesh
from stable_lora_jax.finetune.loading import inject_adapters, load_base
from stable_lora_jax.lora import save_adapter
from stable_lora_jax.optim.hyperparameters import Number, check_range
from stable_lora_jax.training import (
    RunDirectory,
    TrainResult,
    Validation,
    is_first,
    join_processes,
    learning_rate_schedule,
    make_loss,
    make_mesh,
    make_optimizer,
    sign_in,
    suits_unrolling,
    train,
    wait_for_all,
)
from stable_lora_jax.training.sharding import AXES, check_decoder, check_rows, parameter_sharding


def finetune(config: RunConfig) -> TrainResult:
    """Trains the adapters of a model as `config` says, and returns how it ended; everything is in its run directory.

    Raises:
      ValueError: a bad value, bad data, or a run directory that is in use or belongs to another configuration or other
        data.
    """
    schedule, how = config.schedule, config.run
    processes = (how.coordinator, how.processes, how.process_id)
    if how.distributed or processes != (None, None, None):
        join_processes(*processes, heartbeat_timeout=how.heartbeat_timeout)
    items, _ = training_items(config)
    examples = encode_training_items(config, items)
    sizes = parse_mesh(how.mesh)
    mesh = make_mesh(*(sizes.get(axis, 1) for axis in AXES))
    check_rows(mesh, schedule.batch_size, schedule.accumulate)
    batches = training_batches(config, examples, mesh)
    total = total_steps(config, batches.steps_per_epoch)
    method = config.method
    numbers = (schedule.learning_rate, method.lam, method.ratio, method.weight_decay)
    optimizer, rate = update_rule(config, total, *numbers)
    directory = RunDirectory(config.directory)
    seen, written = directory.last_start(), fingerprint(config)
    validation = load_validation(config)
    data = {"total_steps": total, "examples_sha256": digest(examples)}
    if isinstance(items[0], Conversation):
        data["form"] = "chat"  # what the model is to be asked in
    if validation:
        data["validation_sha256"] = digest(validation.examples)
    asked: dict[str, Any] = {"auto_resume": how.auto_resume, "overwrite": how.overwrite}
    asked["defaults"] = fingerprint(RunConfig())
    resume = directory.resumes(written, data, resume=how.resume, **asked)
    # What several devices share would not fit the first of them whole, nor next to its part: each part is read to its
    # device. What is quantized first, and adapters, stay on the host, from where `train` gives each device its part.
    shared = mesh.size > 1 and not config.model.quantize
    with jax.default_device(_host(mesh.size) if mesh.size > 1 else None):
        model = load_base(
            config.model.name,
            config.model.dtype,
            config.model.quantize,
            remat=how.remat,
            attention=how.attention,
            sharding=parameter_sharding(mesh) if shared else None,
        )
        for each in (examples, validation.examples if validation else ()):
            check_fits(each, vocab_size=model.config.vocab_size, max_positions=model.config.max_positions)
        check_decoder(mesh, model)
        inject_adapters(model, config.adapter, schedule.seed)
    unroll = how.unroll
    if unroll is None:  # read back to a float kernel, a quantized layer might stay so in a program without a loop
        unroll = suits_unrolling(mesh) and not config.model.quantize
    for name in how.log if is_first() else ():
        sign_in(name)
    wait_for_all("every process has accepted all of the above")  # nothing is deleted before
    with directory.exclusive_lock() if is_first() else contextlib.nullcontext():
        if is_first():
            directory.own() if resume else directory.prepare(written, data, seen, **asked)
        wait_for_all("the run directory is there")
        result = train(
            model,
            batches,
            optimizer,
            loss=make_loss(config.data.loss, max(len(example.branches) for example in examples)),
            total_steps=total,
            learning_rate=rate,
            run_dir=directory.path,
            mesh=mesh,
            accumulate=schedule.accumulate,
            unroll=unroll,
            norms_every=how.norms_every,
            save_every=how.save_every,
            loggers=how.log,
            keep=how.keep,
            keep_best=how.keep_best,
            resume=resume,
            validation=validation,
        )
        if is_first() and not result.stopped_by:
            directory.check_owner()
            save_adapter(directory.adapter, model, config.model.name)
    wait_for_all("the adapter is written")
    return result


def training_items(config: RunConfig) -> tuple[list[Any], list[Any]]:
    """Returns the questions or completions that are trained on, and those that are kept out."""
    data = config.data
    items = load_items(config, data.name, "train")
    return hold_out(items, data.holdout) if data.holdout else (list(items), [])


def load_items(config: RunConfig, name: str, split: str) -> Sequence[Any]:
    """Returns the questions, completions or conversations of a task, a file (of which all) or a data set of the hub."""
    if name in TASKS:
        return load_task(name, split, source=config.data.source)
    return load_hub(name, split, parse_columns(config.data.map)) if name.startswith("hub:") else load_jsonl(name)


def load_training_examples(config: RunConfig) -> list[Encoded]:
    """Returns the training data as token numbers, with the branches that the loss needs."""
    return encode_training_items(config, training_items(config)[0])


def encode_training_items(config: RunConfig, items: Sequence[Any]) -> list[Encoded]:
    """Returns questions, completions or conversations as token numbers, with the branches that the loss needs."""
    data = config.data
    if data.loss == "choices" and not isinstance(items[0], Question):
        kind = f"{type(items[0]).__name__.lower()}s"
        raise ValueError(f"loss='choices' compares answers; {data.name} contains {kind}. Leave --loss out for them.")
    examples = encode_all(load_tokenizer(config.model.name), items, data.prompt_format, data.template)
    if (moved := sum(example.moved for example in examples)) and is_first():
        print(f"{moved} of {len(examples)} answers begin within a token: that token is learnt as a part of the answer.")
    if data.loss == "answer":
        examples = [right_branch_only(example) for example in examples]
    examples, changed = fit(examples, data.max_length, data.too_long)
    if changed and is_first():
        done = "left out" if data.too_long == "skip" else "cut at their beginning"
        print(f"{changed} of {len(items)} examples take more than {data.max_length} tokens and are {done}.")
    return examples


def load_validation(config: RunConfig) -> Validation | None:
    """Returns what a run validates on; None if it does not.

    Raises:
      ValueError: there is nothing to validate on, or the loss does not suit it.
    """
    data, schedule = config.data, config.schedule
    if schedule.eval_every is None:
        return None
    if data.validation is None and data.holdout:
        _, items = training_items(config)
    else:
        items = load_items(config, data.validation or data.name, "validation")
    examples = encode_all(load_tokenizer(config.model.name), items, data.prompt_format, data.template)
    return Validation(examples, data.loss, schedule.eval_every, schedule.patience)


def training_batches(config: RunConfig, examples: Sequence[Encoded], mesh: Mesh | None = None) -> TrainBatches:
    """Returns the batches of every step, packed unless the configuration says otherwise."""
    schedule = config.schedule
    common: dict[str, Any] = {"batch_size": schedule.batch_size, "seed": schedule.seed}
    common["max_length"] = config.data.max_length
    if not config.data.pack:
        return TrainBatches(examples, **common)
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    steps = total_steps(config, len(examples) // max(1, schedule.batch_size))
    return PackedBatches(examples, **common, num_steps=max(1, steps), multiple=devices * schedule.accumulate)


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Returns the number of steps of the whole run."""
    schedule = config.schedule
    return schedule.steps if schedule.steps is not None else max(1, round(schedule.epochs * steps_per_epoch))


def update_rule(
    config: RunConfig,
    total: int,
    learning_rate: Number,
    lam: Number | None,
    ratio: Number | None,
    weight_decay: Number,
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Returns the configuration's method and its learning rate by step, for these numbers (which may be traced).

    λ and the ratio of rates are None for the methods that have none.
    """
    schedule, method = config.schedule, config.method
    rate = learning_rate_schedule(learning_rate, total, int(schedule.warmup * total), schedule.schedule)
    falling: Any = None
    if lam is not None:
        check_range("lam", lam, 0, 1, "It is the fraction of A removed each step, or at the first step of a schedule.")
        if method.lam_schedule not in (None, "constant"):
            falling = learning_rate_schedule(lam, total, 0, method.lam_schedule)
    optimizer = make_optimizer(
        method.name,
        rate,
        lam=falling or lam,
        ratio=ratio,
        weight_decay=weight_decay,
        clip_norm=method.clip_norm,
        stop_when_stable=method.stop_when_stable is not False,
        decay_only_a=bool(method.decay_only_a),
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
