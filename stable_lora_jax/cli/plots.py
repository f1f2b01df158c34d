"""``stable-lora export-plots``: the figures of finished or running runs."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from stable_lora_jax.finetune import check_choice


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
        check_choice("file_format", self.file_format, ("png", "svg", "pdf"))


def plots_command(config: PlotsConfig) -> list[Path]:
    """Runs `stable-lora export-plots` and returns the files written; see `PlotsConfig`."""
    from stable_lora_jax.training.figures import (
        save_figures,  # here: it brings matplotlib, half a second of any command's start
    )

    files = save_figures(config.runs, config.out, config.file_format)
    for file in files:
        print(file)
    return files
