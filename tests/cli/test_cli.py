"""The commands on a tiny model, in process and, for signals, as a process of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from stable_lora_jax.cli import main
from stable_lora_jax.cli.evaluate import load_with_adapter
from stable_lora_jax.data import encode_all, load_jsonl, load_tokenizer
from stable_lora_jax.evaluation import evaluate
from stable_lora_jax.training import read_metrics


def code_of(arguments) -> int:
    """The exit code, whether `main` returns it or the parser exits with it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def snapshot(directory):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def train_flags(model_dir, data_file):
    return [
        *("train", "--model", model_dir, "--data", data_file, "--rank", 2, "--learning-rate", "1e-2"),
        *("--lam", 0.1, "--norms-every", 2, "--batch-size", 4),
    ]


@pytest.fixture(scope="module")
def finished(train_flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    assert code_of([*train_flags, "--steps", 6, "--run-dir", run]) == 0
    return run


def test_train_leaves_a_whole_run(finished, capsys):
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["method"] == "stable-lora"
    assert config["config"]["steps"] == 6
    assert set(config["versions"]) >= {"stable-lora-jax", "jax", "flax", "optax"}
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "norms" in line] == [0, 2, 4, 6]
    assert (finished / "adapter.safetensors").is_file()
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["6"]


def test_eval_with_and_without_adapter(finished, model_dir, data_file, tmp_path, capsys):
    flags = ["eval", "--model", model_dir, "--data", data_file]
    output = tmp_path / "scores.json"
    examples = encode_all(load_tokenizer(model_dir), load_jsonl(data_file))
    figures = {}
    for adapter, extra in ((None, []), (finished, ["--adapter", finished])):
        assert code_of([*flags, *extra, "--output", output]) == 0
        figures[adapter] = json.loads(output.read_text())
        assert json.loads(capsys.readouterr().out) == figures[adapter]
        assert figures[adapter] == evaluate(load_with_adapter(str(model_dir), adapter), examples).summary()
    assert figures[finished]["nll_token"] < figures[None]["nll_token"]
    assert code_of([*flags, "--adapter", finished / "adapter.safetensors", "--output", output]) == 0
    assert json.loads(output.read_text()) == figures[finished]


def test_limit_is_spread_evenly(model_dir, data_file, tmp_path):
    output = tmp_path / "scores.json"
    lines = data_file.read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines[i * 24 // 18] for i in range(18)))
    assert code_of(["eval", "--model", model_dir, "--data", data_file, "--limit", 18, "--output", output]) == 0
    examples = encode_all(load_tokenizer(model_dir), load_jsonl(few))
    assert json.loads(output.read_text()) == evaluate(load_with_adapter(str(model_dir), None), examples).summary()


def test_generate_prints(finished, model_dir, capsys):
    flags = ["generate", "--model", model_dir, "--prompt", "1+1?", "--max-new-tokens", 5]
    assert code_of([*flags, "--adapter", finished]) == 0
    assert capsys.readouterr().out.startswith("1+1?")
    texts = []
    for seed in (0, 0, 1):
        assert code_of([*flags, "--temperature", 1.0, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_export_plots(finished, tmp_path, capsys):
    assert code_of(["export-plots", finished]) == 0
    told = capsys.readouterr().out.split()
    assert told == [str(finished / "norms.png"), str(finished / "losses.png")]
    for name in told:
        with open(name, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    twin = tmp_path / "other" / finished.name
    shutil.copytree(finished, twin)
    out = tmp_path / "figures"
    assert code_of(["export-plots", finished, twin, "--out", out, "--file-format", "svg"]) == 0
    assert len(list(out.glob("*norms.svg"))) == 2  # runs of one name in two places are two figures
    assert (out / "losses.svg").stat().st_size


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "x"], ["method='x'", "adamw", "stable-lora"]),
        (["--data", "x"], ["data='x'", "arc_easy", "hellaswag", ".jsonl"]),
        (["--model", "x"], ["'x'", "smollm2-135m"]),
        (["--loss", "x"], ["loss='x'", "answer", "choices"]),
        (["--prompt-format", "x"], ["'x'", "cloze", "letter"]),
        (["--lam-schedule", "x"], ["lam_schedule='x'", "cosine", "linear", "constant"]),
        (["--lam-schedule", "cosine", "--lam", "2"], ["lam=2.0 is not in [0, 1)"]),
        (["--holdout", "24"], ["hold out 24 of 24", "1 to 23"]),
        (["--decay-only-a", "--method", "lora-rite"], ["decay_only_a", "lora-rite"]),
        (["--schedule", "x"], ["schedule='x'", "cosine", "linear", "constant"]),
        (["--mesh", "x=2"], ["mesh='x=2'", "data=4,fsdp=2,tensor=1"]),
        (["--mesh", "data=9"], ["data=9", "there are 8"]),
        (["--mesh", "data=2,data=4"], ["mesh='data=2,data=4'"]),
        (["--dtype", "x"], ["dtype='x'", "float32", "bfloat16"]),
        (["--source", "x"], ["wheel", "hub"]),
        (["--targets", "x"], ["x", "qkvo", "q_proj"]),
        (["--accumulate", "3"], ["batch_size=4", "accumulate=3"]),
        (["--steps", "0"], ["steps=0"]),
        (["--warmup", "1.0"], ["warmup_steps=6"]),
        (["--mesh", "data=8"], ["batch of 4 rows", "data=8"]),
    ],
)
def test_train_refuses_and_keeps_what_was_there(train_flags, tmp_path, capsys, flags, told):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("adapter")
    before = snapshot(run)
    assert code_of([*train_flags, "--steps", 6, "--overwrite", "--run-dir", run, *flags]) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in told:
        assert word in message
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["eval", "--data", "x"], ["data='x'", "arc_easy", "hellaswag"]),
        (["eval", "--split", "x"], ["split 'x'", "train, validation, test"]),
        (["eval", "--dtype", "x"], ["dtype='x'", "float32"]),
        (["eval", "--limit", "0"], ["limit=0"]),
        (["eval", "--model", "x"], ["'x'", "smollm2-135m"]),
        (["generate", "--prompt", "a", "--model", "x"], ["'x'", "smollm2-135m"]),
        (["export-plots"], ["no run directory"]),
        (["export-plots", "x"], ["x holds no metrics.jsonl"]),
        (["export-plots", "x", "--file-format", "gif"], ["file_format='gif'", "png, svg, pdf"]),
        (["x"], ["train", "eval", "generate", "export-plots"]),
    ],
)
def test_other_commands_refuse(capsys, flags, told):
    assert code_of(flags) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in told:
        assert word in message


def test_a_run_is_not_touched_without_resume_or_overwrite(train_flags, finished, capsys):
    before = snapshot(finished)
    assert code_of([*train_flags, "--steps", 6, "--run-dir", finished]) == 2
    assert "not empty" in (message := capsys.readouterr().err)
    assert "--resume" in message
    assert "--overwrite" in message
    assert code_of([*train_flags, "--steps", 7, "--rank", 3, "--resume", "--run-dir", finished]) == 2
    message = capsys.readouterr().err
    assert "rank: run 2, now 3" in message
    assert "steps: run 6, now 7" in message
    assert snapshot(finished) == before
    empty = finished.parent / "none"
    assert code_of([*train_flags, "--resume", "--run-dir", empty]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert not empty.exists()


def test_resuming_a_finished_run_and_overwriting_one(train_flags, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    adapter = (run / "adapter.safetensors").read_bytes()
    assert code_of([*train_flags, "--steps", 6, "--resume", "--run-dir", run]) == 0
    assert "Trained 6 steps." in capsys.readouterr().out
    assert (run / "adapter.safetensors").read_bytes() == adapter
    assert code_of([*train_flags, "--steps", 2, "--overwrite", "--run-dir", run]) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]


def test_adapter_of_another_base_is_refused(finished, model_dir, data_file, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    assert code_of(["eval", "--model", other, "--data", data_file, "--adapter", finished]) == 2
    assert "does not belong to this model" in (message := capsys.readouterr().err)
    assert str(other) in message


@pytest.fixture(scope="module")
def long_run(train_flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("long") / "run"
    flags = [*train_flags, "--steps", 400, "--dropout", 0.1]
    assert code_of([*flags, "--run-dir", run]) == 0
    return flags, run


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_resume_is_exact(long_run, tmp_path, kind):
    flags, whole = long_run
    run = tmp_path / "run"
    command = [sys.executable, "-m", "stable_lora_jax.cli", *map(str, flags), "--run-dir", str(run)]
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        while len(read_metrics(metrics)) < 4 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(kind)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + kind, err
    steps = [line["step"] for line in read_metrics(metrics) if "loss" in line]
    assert 0 < steps[-1] < 400
    assert f"Stopped by {kind.name} at step {steps[-1]} of 400; --resume" in out
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(steps[-1])]
    assert not (run / "adapter.safetensors").exists()
    assert code_of([*flags, "--run-dir", run, "--resume"]) == 0
    assert (run / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    losses = [[(x["step"], x["loss"]) for x in read_metrics(r / "metrics.jsonl") if "loss" in x] for r in (run, whole)]
    assert losses[0] == losses[1]
