"""The command line: ``stable-lora train | eval | generate | export | export-plots | watch | plan``."""

import os
import signal
import sys
from collections.abc import Sequence

import tyro


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0; 1 for what the same command may get past (another process was lost, a checkpoint could not be written), and, with
    a traceback, for errors of the runtime and of this program; 2 for what it will not (a refused input, a file that
    cannot be read or written, a loss that is not finite); 128 + n when signal n stopped a training.
    """
    # Only its tokenizers are used; it would warn that PyTorch, which we do not need, is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from stable_lora_jax.cli.evaluate import EvalConfig, eval_command
    from stable_lora_jax.cli.export import ExportConfig, export_command
    from stable_lora_jax.cli.generate import GenerateConfig, generate_command
    from stable_lora_jax.cli.plan import PlanConfig, plan_command
    from stable_lora_jax.cli.plots import PlotsConfig, plots_command
    from stable_lora_jax.cli.train import TrainConfig, train_command
    from stable_lora_jax.cli.watch import WatchConfig, watch_command
    from stable_lora_jax.training import CheckpointError, LostProcessError, NonFiniteLossError

    commands = {
        TrainConfig: ("train", train_command),
        EvalConfig: ("eval", eval_command),
        GenerateConfig: ("generate", generate_command),
        ExportConfig: ("export", export_command),
        PlotsConfig: ("export-plots", plots_command),
        WatchConfig: ("watch", watch_command),
        PlanConfig: ("plan", plan_command),
    }
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {name: kind for kind, (name, _) in commands.items()},
            prog="stable-lora",
            description="Stable-LoRA (arXiv 2603.05204): fine-tune, evaluate, generate, export, plot, watch, plan.",
            args=arguments,
        )
        result = commands[type(config)][1](config)
    except (ValueError, OSError, NonFiniteLossError, LostProcessError, CheckpointError) as error:
        print("\n".join([f"stable-lora: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr, flush=True)
        if isinstance(error, LostProcessError):
            sys.stdout.flush()
            os._exit(1)  # an orderly end would wait for the process that is lost
        return 1 if isinstance(error, CheckpointError) else 2
    except KeyboardInterrupt:  # before a training could take it
        print("stable-lora: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    stopped_by = getattr(result, "stopped_by", None)
    return 128 + stopped_by if stopped_by else 0
