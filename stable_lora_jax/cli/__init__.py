"""The command line: ``stable-lora train | eval | generate | export | export-plots | watch | plan``.

This file imports nothing heavy, so that a signal is answered from the first moments on.
"""

import os
import signal
import sys
from collections.abc import Sequence

from stable_lora_jax.extras import needs

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run() -> int:
    """Runs the command of `sys.argv`, as a process of its own, and returns its exit code (see `main`).

    A signal ends the process at once, with one line and code 128 + n, whatever it is doing: importing, loading, or
    writing a checkpoint (which becomes one only when it is whole). While a training runs, the first signal lets the
    step under way finish and be saved, and the second one does this.
    """
    kinds = [kind for kind in STOP_SIGNALS if signal.getsignal(kind) is not signal.SIG_IGN]  # as nohup has it
    for kind in kinds:
        signal.signal(kind, _end)
    try:
        return main()
    finally:
        # What remains is Python's own end, in which a signal would change the exit code of what is done.
        for kind in kinds:
            signal.signal(kind, signal.SIG_IGN)


def _end(number: int, frame: object) -> None:
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2,
        f"\nstable-lora: ended by {signal.Signals(number).name}\n".encode(),
    )
    os._exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0; 1 for what the same command may get past (another process was lost, a checkpoint could not be written), and, with
    a traceback, for errors of the runtime and of this program; 2 for what it will not (a refused input, a file that
    cannot be read or written, a loss that is not finite); 128 + n when signal n stopped a training.
    """
    # Only its tokenizers are used; it would warn that PyTorch, which we do not need, is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with needs("train"):
            import tyro

            from stable_lora_jax.assets import cache_dir
            from stable_lora_jax.cli.config_file import with_file
            from stable_lora_jax.cli.evaluate import EvalConfig, eval_command
            from stable_lora_jax.cli.export import ExportConfig, export_command
            from stable_lora_jax.cli.generate import GenerateConfig, generate_command
            from stable_lora_jax.cli.plan import PlanConfig, plan_command
            from stable_lora_jax.cli.plots import PlotsConfig, plots_command
            from stable_lora_jax.cli.train import RunConfig, train_command
            from stable_lora_jax.cli.watch import WatchConfig, watch_command
            from stable_lora_jax.training import (
                CheckpointError,
                LostProcessError,
                LostRunError,
                NonFiniteLossError,
                compilation_cache,
            )
    except ModuleNotFoundError as error:
        print(f"stable-lora: {error}", file=sys.stderr)
        return 2

    commands = {
        RunConfig: ("train", train_command),
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
            args=with_file(sys.argv[1:] if arguments is None else arguments),
            config=(tyro.conf.OmitArgPrefixes,),  # sections do not show
        )
        with compilation_cache(cache_dir() / "compiled"):
            result = commands[type(config)][1](config)
    except (ValueError, OSError, NonFiniteLossError, LostProcessError, LostRunError, CheckpointError) as error:
        print("\n".join([f"stable-lora: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr, flush=True)
        if isinstance(error, LostProcessError):
            sys.stdout.flush()
            os._exit(1)  # an orderly end would wait for the process that is lost
        return 1 if isinstance(error, CheckpointError) else 2
    except KeyboardInterrupt:  # in a program that called this
        print("stable-lora: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    stopped_by = getattr(result, "stopped_by", None)
    return 128 + stopped_by if stopped_by else 0
