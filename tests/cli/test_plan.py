"""The command: what it prints and writes, its exit code, and its messages."""

import json

import pytest

from tests.cli.test_cli import code_of

SMALL = ["plan", "--estimate", "--topology", "v5e:2x2", "--batch", "8", "--length", "128"]


def plan(*flags):
    return code_of([*SMALL, *flags])


def test_a_known_model(tmp_path, capsys):
    file = tmp_path / "plan.json"
    flags = ("--model", "smollm2-135m", "--price-per-chip-hour", 2, "--steps", 1000, "--json", file)
    assert plan(*flags) == 0
    record, told = json.loads(file.read_text()), capsys.readouterr().out
    assert record["source"] == "estimate"
    assert "ESTIMATE" in told
    assert record["parameters"]["frozen"] == 134_515_008
    assert "134,515,008 frozen" in told
    assert record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}  # all chips, as no mesh was given
    assert record["run"]["cost"]["least"] == pytest.approx(record["step_seconds"]["least"] * 1000 / 3600 * 4 * 2)
    assert f"{record['run']['cost']['least']:,.2f} to" in told
    assert f"binds             {record['binds']}" in told
    for kind in ("all-gather of 4 chips", "all-reduce of 4 chips"):
        assert kind in told


def test_gpus_are_estimated_where_nothing_compiles_for_them(capsys):
    assert plan("--model", "llama-3.2-1b", "--topology", "h100:8", "--length", "1024") == 0
    told = capsys.readouterr().out
    assert "h100:8, 8 chips" in told
    assert "ESTIMATE: nothing was compiled for these devices" in told


def test_a_directory(model_dir, capsys):
    assert plan("--model", model_dir, "--mesh", "data=2,tensor=2") == 0
    assert "all-reduce of 2 chips" in capsys.readouterr().out


def test_a_directory_with_a_damaged_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert plan("--model", tmp_path) == 2
    assert "config.json does not hold a JSON object" in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_ends_with_an_error(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan("--model", "llama-3.1-70b", "--json", file) == 2
    assert not json.loads(file.read_text())["fits"]
    message = capsys.readouterr().err
    assert "llama-3.1-70b does not fit v5e:2x2" in message
    assert "a larger slice" in message


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "x"], ["model='x'", "qwen2-0.5b", "llama-3.1-70b", "config.json"]),
        (["--topology", "x"], ["'x' is no known chip", "v5e:4x4"]),
        (["--topology", "v5e:2x2x2"], ["A slice of v5e has 2 axes"]),
        (["--topology", "h100:16"], ["Plans for GPUs are of one host", "h100:8"]),
        (["--topology", "h100:2x2"], ["not understood at '2x2'"]),
        (["--mesh", "fsdp=8"], ["fsdp=8", "v5e:2x2 has 4 chips"]),
        (["--batch", "6"], ["batch of 6 rows", "fsdp=4"]),
        (["--accumulate", "3"], ["8 rows", "accumulate=3"]),
        (["--model", "smollm2-135m", "--mesh", "tensor=4"], ["tensor=4", "num_heads=9", "1, 3"]),
        (["--steps", "5"], ["--price-per-chip-hour and --steps"]),
        (["--length", "0"], ["length=0"]),
        (["--method", "x"], ["method='x'", "stable-lora"]),
        (["--targets", "x"], ["q_proj"]),
    ],
)
def test_errors(capsys, flags, told):
    assert plan(*flags) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in told:
        assert word in message
