"""What a command exits with, by what went wrong."""

import signal
import sys

import jax
import pytest

from stable_lora_jax.cli import main
from stable_lora_jax.training import CheckpointError, LostProcessError, NonFiniteLossError
from tests.cli.test_cli import code_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad"), 2),
        (OSError("unreadable"), 2),
        (NonFiniteLossError("nan"), 2),
        (CheckpointError("disk full"), 1),
        (LostProcessError("gone"), 1),
    ],
)
def test_exit_codes_tell_what_the_same_command_may_get_past(monkeypatch, capsys, error, code):
    monkeypatch.setattr("stable_lora_jax.cli.train.train_command", raising(error))
    monkeypatch.setattr("os._exit", sys.exit)
    assert code_of(["train"]) == code
    assert capsys.readouterr().err == f"stable-lora: {error}\n"


def test_an_interrupt_before_training_ends_quietly(monkeypatch, capsys):
    monkeypatch.setattr("stable_lora_jax.cli.train.train_command", raising(KeyboardInterrupt()))
    assert code_of(["train"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "stable-lora: interrupted\n"


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, RuntimeError])
def test_errors_of_the_runtime_keep_their_traceback(monkeypatch, kind):
    monkeypatch.setattr("stable_lora_jax.cli.train.train_command", raising(kind("out of memory")))
    with pytest.raises(kind, match="out of memory"):
        main(["train"])


def raising(error):
    def command(config):
        raise error

    return command
