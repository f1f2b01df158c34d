"""``stable-lora export-plots``: the figures of finished or running runs."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from stable_lora_jax.cli.train import known
from stable_lora_jax.plots import plot_losses, plot_norms


@dataclass(frozen=True, kw_only=True)
class PlotsConfig:
    """Draw norms and gap of each run, and the losses of all runs together."""

    runs: Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """Folder for the figures; each run's own, and the first run's for the losses, if not given."""
    file_format: str = "png"
    """png, svg or pdf."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("export-plots got no run directory. Give at least one, e.g. runs/demo/stable-lora.")
        known("file_format", self.file_format, ("png", "svg", "pdf"))


def plots_command(config: PlotsConfig) -> list[Path]:
    """Runs `stable-lora export-plots` and returns the files written; see `PlotsConfig`."""
    figures, labels = {}, _labels(config.runs)
    for label, run in labels.items():
        stem = "norms" if config.out is None else f"{label.replace('/', '-')}-norms"
        file, number = (config.out or run) / f"{stem}.{config.file_format}", 1
        while file in figures:  # the same name once its slashes are hyphens
            number += 1
            file = file.with_name(f"{stem}-{number}.{config.file_format}")
        figures[file] = plot_norms(run)
    losses = plot_losses(labels)
    figures[(config.out or config.runs[0]) / f"losses.{config.file_format}"] = losses
    for path, figure in figures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        print(path)
    return list(figures)


def _labels(runs: tuple[Path, ...]) -> dict[str, Path]:
    """Returns label -> run: the directory's name, or its path where two have the same name."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else run.as_posix().strip("/"): run for run in runs}
