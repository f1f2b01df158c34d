"""The training loop: steps, metrics, checkpoints, and a clean end however it ends."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from stable_lora_jax.data import BatchRows, TrainBatches, prefetch
from stable_lora_jax.locations import Location
from stable_lora_jax.models import Decoder
from stable_lora_jax.optim import (
    LoraRiteState,
    StableLoraState,
    lora_rite_report,
    pair_norms,
    stability,
    update_terms,
)
from stable_lora_jax.optim.pairs import PyTree, find_states
from stable_lora_jax.training.checkpoints import checkpoints
from stable_lora_jax.training.distributed import (
    is_first,
    local_rows,
    max_across_processes,
    rows_to_mesh,
    shared_work,
    to_mesh,
)
from stable_lora_jax.training.loggers import Logger, make_logger
from stable_lora_jax.training.loss import Loss
from stable_lora_jax.training.methods import STACK_AXES
from stable_lora_jax.training.metrics import MetricsFile
from stable_lora_jax.training.run_directory import RunDirectory
from stable_lora_jax.training.sharding import (
    batch_sharding,
    check_decoder,
    check_rows,
    make_mesh,
    placement_on,
    replicated,
)
from stable_lora_jax.training.step import (
    StepMetrics,
    TrainState,
    compile_step,
    init_state,
    join_model,
    place,
    split_model,
)
from stable_lora_jax.training.validation import Validated, Validation


class NonFiniteLossError(RuntimeError):
    """Training met a loss, gradient or update that is not finite; the message names the step and what is kept."""


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
      steps: done.
      total_steps: of the whole run.
      stopped_by: the signal that stopped it early, if one did.
      loss: of the last step; None if there was none.
      validation: the last validation; None without.
      best_step: the step whose adapters the model holds; another than the last where the best ones are kept.
    """

    steps: int
    total_steps: int
    stopped_by: signal.Signals | None
    loss: float | None
    validation: Validated | None = None
    best_step: int | None = None


def train(
    model: Decoder,
    batches: TrainBatches,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    loss: Loss,
    total_steps: int,
    learning_rate: optax.Schedule,
    run_dir: Location,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    unroll: bool = False,
    norms_every: int = 10,
    save_every: int = 200,
    keep: int = 2,
    keep_best: bool = False,
    loggers: Sequence[str] = (),
    resume: bool = False,
    progress: bool = True,
    validation: Validation | None = None,
) -> TrainResult:
    """Trains the adapters inside `model`, in place, and returns how it ended.

    SIGINT, SIGTERM and SIGHUP let the step under way finish, save, and return. A loss, gradient or update that is not
    finite raises, and leaves the last checkpoint as it is. Several processes call it alike (see
    `training.distributed`); a signal to any of them stops all.

    Args:
      model: a model with adapters.
      batches: the batch of every step.
      optimizer: e.g. from `make_optimizer`.
      loss: from `make_loss`.
      total_steps: steps of the whole run, also when it is resumed.
      learning_rate: by step, for the metrics.
      run_dir: gets metrics.jsonl and checkpoints/; a folder, or gs://BUCKET/...
      mesh: from `make_mesh`; one device if None.
      accumulate: parts that each batch is processed in, each of them split over the mesh.
      unroll: whether the step writes the model's layers out instead of looping over them; see `suits_unrolling`.
      norms_every: steps between two records of all pairs' norms, and of what the step added (`update_terms`).
      save_every: steps between two checkpoints.
      keep: newest checkpoints kept.
      keep_best: keep the checkpoint of lowest loss too. With `validation` that is its loss, there is a checkpoint at
        every validation, and the model gets the adapters of the best one in the end. Without, it is the training loss,
        meaned over the steps since the checkpoint before; after a run that went wrong, it is the one from before.
      loggers: what gets the metrics besides the file, by name; see `LOGGERS`.
      resume: continue from the newest checkpoint in `run_dir`.
      progress: show a progress bar, in the first process.
      validation: examples to validate on, how often, and when to end by it.

    Raises:
      NonFiniteLossError: see above.
      CheckpointError: a checkpoint could not be written; raised at the first step after it failed.
      LostProcessError: another process has ended.
      LostRunError: another process has resumed or replaced the run (in a bucket, which has no locks).
      ValueError: nothing to resume from, a checkpoint of something else or a damaged one, checkpoints of another run
        in `run_dir`, a batch that does not split into parts or over the mesh, a mesh that does not divide the model, or
        a number of steps below 1.
    """
    check_intervals(total_steps=total_steps, norms_every=norms_every, save_every=save_every)
    mesh = mesh or make_mesh()
    by_rows, everywhere = batch_sharding(mesh), replicated(mesh)
    check_rows(mesh, batches.num_rows, accumulate)
    check_decoder(mesh, model)
    graph, adapters, frozen = split_model(model)
    frozen = to_mesh(frozen, place(mesh, frozen))
    # A copy: the state is donated step by step, and the model must stay whole if a step fails.
    state = to_mesh(init_state(jax.tree.map(jnp.copy, adapters), optimizer), everywhere)
    directory = RunDirectory(run_dir)
    with checkpoints(directory.checkpoints, keep, keep_best) as saved, _stop_signal() as received, shared_work():
        if resume:
            state = saved.restore(state)
        elif (last := saved.latest_step()) is not None:
            raise ValueError(
                f"{run_dir} contains checkpoints up to step {last} of an earlier run. Resume it with resume=True, or "
                "give a new directory."
            )
        start, stopped_by = int(state.step), None
        before_start = [line for line in directory.metrics() if line["step"] <= start] if start else []
        validated = [line["validation"]["loss"] for line in before_start if "validation" in line]
        step = compile_step(graph, loss, optimizer, mesh=mesh, frozen=frozen, accumulate=accumulate, unroll=unroll)
        told_to_stop = max_across_processes(mesh)
        rows = BatchRows(batches, local_rows(by_rows, batches.num_rows))
        shown = progress and is_first()
        bar = tqdm(total=total_steps, initial=start, desc="train", unit="step", disable=not shown)
        with bar, ExitStack() as opened:
            files: list[Logger] = []
            if is_first():
                files += [MetricsFile(directory.metrics_file, start, directory.check_owner)]
                files += [make_logger(name, directory.path, start) for name in loggers]
            for file in files:
                opened.enter_context(closing(file))
            check = partial(check_finite, kept=saved.latest_step)
            record = _Record(files, bar, _rates(learning_rate, total_steps), check, _flags(state.opt_state))
            if not start:
                record.norms(state)
            last_step = start if validation and validation.is_over(validated) else total_steps
            for index, batch in prefetch(rows, start, last_step):
                recorded = (index + 1) % norms_every == 0 or index + 1 == total_steps
                before = jax.tree.map(jnp.copy, state.adapters) if recorded else None
                state, metrics = step(state, frozen, rows_to_mesh(batch, by_rows, batches.num_rows))
                record.step(index + 1, metrics, batches.num_tokens(index))
                saved.check()
                if before is not None:
                    record.norms(state, before)
                if validation and ((index + 1) % validation.every == 0 or index + 1 == total_steps):
                    trained = join_model(graph, state.adapters, frozen, placement_on(mesh))
                    now = record.validate(index + 1, validation, trained)
                    validated.append(now.loss)
                    if keep_best:
                        record.sync()
                        saved.save(state, now.loss)
                    if validation.is_over(validated):
                        break
                if (index + 1) % save_every == 0 and index + 1 < total_steps:
                    record.sync()
                    saved.save(state, None if validation else record.mean_loss())
                number = told_to_stop(received[0] if received else 0)
                if number and index + 1 < total_steps:
                    stopped_by = signal.Signals(number)
                    break
            mean_loss = record.mean_loss()
            record.sync()
        saved.save(state, None if validation else mean_loss)
        steps, best = int(state.step), None
        if validation and keep_best and not stopped_by and (best := saved.best_step()) not in (None, steps):
            state = saved.restore(state, best)
    # Back to where they came from: the rest of the model never moved to the mesh.
    nnx.update(model, jax.device_put(jax.device_get(state.adapters), jax.tree.map(lambda x: x.sharding, adapters)))
    return TrainResult(steps, total_steps, stopped_by, record.loss, record.validated, best or steps)


def check_intervals(**steps: int) -> None:
    """Raises ValueError, with its name, for a number of steps below 1."""
    for name, count in steps.items():
        if count < 1:
            raise ValueError(f"{name}={count} is below 1. Count steps from 1.")


def check_finite(
    step: int, loss: float, grad_norm: float, update_norm: float, *, kept: Callable[[], int | None]
) -> None:
    """Raises NonFiniteLossError if a step's loss, gradient or update is not finite.

    Args:
      step, loss, grad_norm, update_norm: what the step returned.
      kept: returns the step of the newest checkpoint, None if there is none.
    """
    if np.isfinite([loss, grad_norm, update_norm]).all():
        return
    saved = kept()
    raise NonFiniteLossError(
        f"Step {step} has loss {loss}, gradient norm {grad_norm} and update norm {update_norm}. "
        + ("No checkpoint was saved yet. " if saved is None else f"The checkpoint of step {saved} is kept. ")
        + "Resuming leads here again: look at the data of this step, or start another run, with a lower learning rate "
        "or scale alpha / r."
    )


@dataclass
class _Record:
    """Writes metrics one step late, so that the device is already busy with the next step when they are fetched."""

    files: Sequence[Logger]
    bar: tqdm
    rates: np.ndarray
    check: Callable[[int, float, float, float], None]
    _stable: dict[str, np.ndarray]
    loss: float | None = None
    validated: Validated | None = None
    _waiting: tuple[int, StepMetrics, int] | None = None
    _last: float = field(default_factory=time.perf_counter)
    _losses: list[float] = field(default_factory=list)

    def step(self, step: int, metrics: StepMetrics, tokens: int) -> None:
        """Takes the metrics of a step that may still be running, and writes those of the one before."""
        self.flush()
        self._waiting = (step, metrics, tokens)

    def mean_loss(self) -> float | None:
        """Returns the mean loss of the steps since it was asked last."""
        self.flush()
        losses, self._losses = self._losses, []
        return float(np.mean(losses)) if losses else None

    def flush(self) -> None:
        """Writes what is waiting, once it has passed the check."""
        if self._waiting is None:
            return
        (step, metrics, tokens), self._waiting = self._waiting, None
        self.loss, grad_norm, update_norm = (float(each) for each in metrics[:3])
        self.check(step, self.loss, grad_norm, update_norm)
        self._losses.append(self.loss)
        now = time.perf_counter()
        rate, self._last = tokens / (now - self._last), now
        pairs, stable = self._flags(step, metrics)
        self._write(
            step=step,
            loss=self.loss,
            grad_norm=grad_norm,
            update_norm=update_norm,
            learning_rate=self.rates[step - 1],
            tokens_per_second=rate,
            stable=stable,
            pairs=pairs,
        )
        told = {"stable pairs": f"{stable}/{pairs}"} if pairs else {}
        if self.validated:
            told["validation"] = f"{self.validated.loss:.3f}"
        self.bar.set_postfix({"loss": f"{self.loss:.3f}", "tok/s": f"{rate:.0f}", **told}, refresh=False)
        self.bar.update()

    def sync(self) -> None:
        """Writes what is waiting, to where a checkpoint that follows finds it."""
        self.flush()
        for file in self.files:
            if isinstance(file, MetricsFile):
                file.sync()

    def validate(self, step: int, validation: Validation, model: Decoder) -> Validated:
        """Validates the model of a step, writes what was measured, and returns it."""
        self.flush()
        self.validated = found = validation.measure(model)
        self._write(step=step, validation={name: value for name, value in found._asdict().items() if value is not None})
        self._last = time.perf_counter()
        return found

    def _write(self, **values: object) -> None:
        for file in self.files:
            file.write(**values)

    def norms(self, state: TrainState, before: PyTree | None = None) -> None:
        """Writes norms and gap of every pair, and the terms of the step from the adapters `before`."""
        self.flush()
        report = jax.device_get(_norms(state))
        norms = {name: {"norm_a": pair.norm_a, "norm_b": pair.norm_b, "gap": pair.gap} for name, pair in report.items()}
        for name, terms in ({} if before is None else jax.device_get(_terms(before, state.adapters))).items():
            norms[name] |= terms._asdict()
        self._write(step=int(state.step), norms=norms)
        if find_states(state.opt_state, LoraRiteState):
            rite = jax.device_get(lora_rite_report(state.adapters, state.opt_state, stack_axes=STACK_AXES))
            self._write(step=int(state.step), lora_rite=rite._asdict())

    def _flags(self, step: int, metrics: StepMetrics) -> tuple[int, int]:
        """Writes which matrices became stable in this step; returns how many there are and how many are stable."""
        flags = {name: np.asarray(flag) for name, flag in metrics.stable.items()}
        for name, flag in flags.items():
            for index in np.argwhere(flag & ~self._stable[name]):
                self._write(step=step, pair=name, index=index, stable=True)
        self._stable = flags
        return sum(flag.size for flag in flags.values()), int(sum(flag.sum() for flag in flags.values()))


def _rates(learning_rate: optax.Schedule, total_steps: int) -> np.ndarray:
    """Returns the rates of all steps at once: asked for one by one, each would wait for the device's next step."""
    # From step 0 even when a run resumes: the last bits may depend on where a number stands in its vector.
    return np.asarray(jax.jit(jax.vmap(learning_rate))(jnp.arange(total_steps)))


def _flags(opt_state: optax.OptState) -> dict[str, np.ndarray]:
    """Returns the flags where training starts: what was stable before a resume is not news."""
    found = find_states(opt_state, StableLoraState)
    return {name: np.asarray(flag) for state in found for name, flag in state.stable.items()}


@jax.jit
def _norms(state: TrainState):
    if find_states(state.opt_state, StableLoraState):
        return stability(state.adapters, state.opt_state, stack_axes=STACK_AXES)
    return pair_norms(state.adapters, stack_axes=STACK_AXES)


_terms = jax.jit(partial(update_terms, stack_axes=STACK_AXES))


@contextmanager
def _stop_signal() -> Iterator[list[signal.Signals]]:
    """Yields a list that holds the first SIGINT, SIGTERM or SIGHUP received; a second one has its usual effect.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():  # handlers can only be set there
        yield received
        return
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    before = {kind: handler for kind, handler in before.items() if handler is not signal.SIG_IGN}

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        restore()

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    for kind in before:
        signal.signal(kind, receive)
    try:
        yield received
    finally:
        restore()
