"""How a run is carried out, as opposed to what is computed: all of it may differ when a run is resumed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stable_lora_jax.locations import is_url, location
from stable_lora_jax.training import check_intervals, check_logger
from stable_lora_jax.training.sharding import AXES


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How the run is carried out."""

    config: Path | None = None
    """A YAML file of options, one per line (`rank: 8`); options given here override the file's."""
    print_config: bool = False
    """Print every option as such a file, and end."""
    run_dir: Path | None = None
    """Where the run goes, a folder or gs://BUCKET/...; runs/DATA-METHOD-SEED if not given."""
    resume: bool = False
    """Resume from the newest checkpoint of the run."""
    auto_resume: bool = False
    """Resume from the newest checkpoint of the run, or start it: one command for a job that may be stopped anywhere."""
    overwrite: bool = False
    """Delete the run that is in the run directory."""
    norms_every: int = 10
    """Steps between two records of every pair's norms."""
    save_every: int = 200
    """Steps between two checkpoints."""
    log: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_best: bool = False
    """With --eval-every, the adapter of the lowest validation loss is the result. Without, keep the checkpoint of the
    lowest training loss (the mean since the one before) too; --resume takes it once the newer ones are moved away."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """How attention is computed: auto (cudnn or splash where the device has it), xla, cudnn or splash."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    unroll: bool | None = None
    """Write the layers out in the step's program instead of looping over them; it takes two to three times as long to
    compile. Not given: where it saves copies, on GPUs that hold the base whole and not quantized."""
    mesh: str = ""
    """Devices, e.g. data=4,fsdp=2,tensor=1; one device if empty."""
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
        if is_url(self.run_dir) and "tensorboard" in self.log:
            raise ValueError(
                f"log='tensorboard' writes to a folder, and {self.run_dir} is none. Use wandb, or a --run-dir in a "
                "file system."
            )
        if self.run_dir is not None:
            location(self.run_dir)  # refuses what it cannot be
        for name in self.log:
            check_logger(name)
        check_intervals(norms_every=self.norms_every, save_every=self.save_every)
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} is below 1. Keep at least the newest checkpoint.")
        if self.resume + self.auto_resume + self.overwrite > 1:
            raise ValueError("--resume, --auto-resume and --overwrite exclude each other. Choose one of them.")


def parse_mesh(text: str) -> dict[str, int]:
    """Returns axis -> size from "data=4,fsdp=2"; nothing from an empty text.

    Examples:
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
