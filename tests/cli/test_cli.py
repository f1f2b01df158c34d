"""The commands on a tiny model, in process and, for signals, as a process of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from stable_lora_jax import training
from stable_lora_jax.cli import main
from stable_lora_jax.data import encode_all, hold_out, load_jsonl, load_tokenizer
from stable_lora_jax.evaluation import evaluate
from stable_lora_jax.finetune import base_of, load_with_adapter
from stable_lora_jax.lora import read_adapter_spec, save_adapter
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
    assert config["config"]["method"]["name"] == "stable-lora"
    assert config["config"]["schedule"]["steps"] == 6
    assert set(config["versions"]) >= {"stable-lora-jax", "jax", "flax", "optax"}
    head = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert (config["commit"] or "").removesuffix("+") == head.stdout.strip()
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "norms" in line] == [0, 2, 4, 6]
    assert (finished / "adapter.safetensors").is_file()
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["6"]


def with_data(record, file):
    """A run's config.json, of other data."""
    config = record["config"]
    return record | {"config": config | {"data": config["data"] | {"name": str(file)}}}


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


def test_a_merged_export_scores_as_the_adapter_does(finished, model_dir, data_file, tmp_path):
    assert code_of(["export", finished, tmp_path / "merged", "--format", "merged"]) == 0
    scores = []
    for flags in (["--model", model_dir, "--adapter", finished], ["--model", tmp_path / "merged"]):
        output = tmp_path / "scores.json"
        assert code_of(["eval", "--data", data_file, "--output", output, *flags]) == 0
        scores.append(json.loads(output.read_text()))
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    # A whole model takes nothing else into its directory.
    assert code_of(["export", finished, tmp_path / "merged", "--format", "merged"]) == 2


def test_a_quantized_base_and_as_many_ranks_as_layers(train_flags, model_dir, data_file, tmp_path, capsys):
    run, scores, told = tmp_path / "run", [], []
    flags = [*train_flags, "--rank", 3, "--steps", 4, "--quantize", "int8", "--prompt-format", "letter"]
    assert code_of([*flags, "--run-dir", run]) == 0
    assert json.loads((run / "config.json").read_text())["config"]["model"]["quantize"] == "int8"
    own = ["--adapter", run]
    file = ["--adapter", run / "adapter.safetensors"]
    for extra in (
        ["--model", model_dir, "--prompt-format", "letter"],
        [*own, "--quantize", "none"],
        own,
        [*file, "--model", model_dir, "--quantize", "int8", "--prompt-format", "letter"],
        [*own, "--prompt-format", "cloze"],
    ):
        capsys.readouterr()
        assert code_of(["eval", "--data", data_file, *extra]) == 0
        captured = capsys.readouterr()
        scores.append(json.loads(captured.out)["nll_token"])
        told.append([line for line in captured.err.splitlines() if "was trained with" in line])
    # Trained on the quantized base, good on both, which are not the same.
    assert max(scores[1:3]) < scores[0]
    assert 0 < abs(scores[1] - scores[2]) < 0.02
    # The run's own model, quantization and format are the default; others are told.
    assert scores[2] == scores[3] != scores[4]
    assert told[0] == told[2] == told[3] == []
    assert told[1] == [f"quantize: none as given; {run} was trained with int8"]
    assert told[4] == [f"prompt_format: cloze as given; {run} was trained with letter"]
    texts = []
    for extra in ([], ["--model", model_dir, "--quantize", "int8"]):
        assert code_of(["generate", "--prompt", "1+1?", "--max-new-tokens", 5, *own, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert code_of(["export", run, tmp_path / "merged", "--format", "merged"]) == 0
    assert "Note: it was trained on the base in int8" in capsys.readouterr().out
    assert code_of([*train_flags, "--quantize", "int3", "--run-dir", run, "--overwrite"]) == 2
    assert "nf4" in capsys.readouterr().err


def test_limit_is_spread_evenly(model_dir, data_file, tmp_path):
    output = tmp_path / "scores.json"
    lines = data_file.read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines[i * 24 // 18] for i in range(18)))
    assert code_of(["eval", "--model", model_dir, "--data", data_file, "--limit", 18, "--output", output]) == 0
    examples = encode_all(load_tokenizer(model_dir), load_jsonl(few))
    assert json.loads(output.read_text()) == evaluate(load_with_adapter(str(model_dir), None), examples).summary()


def test_a_prompt_is_asked_by_the_chat_template_or_continued(finished, model_dir, tmp_path, capsys):
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    chat = tmp_path / model_dir.name
    shutil.copytree(model_dir, chat)
    tokenizer = load_tokenizer(chat)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chat)
    texts = {}
    for adapter in ([], ["--adapter", finished]):
        for form in (None, "chat", "raw"):
            flags = ["generate", "--model", chat, "--max-new-tokens", 5, *adapter, *(["--form", form] if form else [])]
            assert code_of([*flags, "--prompt", "1+1?"]) == 0
            texts[bool(adapter), form] = capsys.readouterr().out
            assert texts[bool(adapter), form].startswith("1+1?") == (form == "raw" or (form is None and bool(adapter)))
    assert texts[False, None] == texts[False, "chat"]
    assert texts[True, None] == texts[True, "raw"]
    # What stands in the template reaches the model.
    assert code_of(["generate", "--model", model_dir, "--max-new-tokens", 5, "--prompt", "<1+1?>"]) == 0
    assert capsys.readouterr().out == "<1+1?>" + texts[False, "chat"]


def test_generate_prints(finished, model_dir, capsys):
    flags = ["generate", "--model", model_dir, "--prompt", "1+1?", "--max-new-tokens", 5]
    assert code_of([*flags, "--adapter", finished]) == 0
    assert capsys.readouterr().out.startswith("1+1?")
    texts = []
    for seed in (0, 0, 1):
        assert code_of([*flags, "--temperature", 1.0, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_export_plots(finished, tmp_path, capsys, monkeypatch):
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
    # Paths that read alike once their slashes are hyphens, and one run named twice.
    alike = [tmp_path / "x" / name for name in ("a-b/r", "a/b/r")]
    alike += [tmp_path / "x-a-b" / "r"]
    for path in alike:
        shutil.copytree(finished, path)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    relative = [path.relative_to(tmp_path) for path in alike]
    assert code_of(["export-plots", *relative, relative[0], "--out", "together"]) == 0
    told = capsys.readouterr().out.split()
    assert len(told) == len(set(told)) == len(list((tmp_path / "together").iterdir())) == 4


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
    other = ["--alpha", 3, "--targets", "qkvo", "--method", "adamw", "--dtype", "bfloat16", "--weight-decay", 0.1]
    without_lam = [flag for flag in train_flags if flag not in ("--lam", 0.1)]  # AdamW has none
    assert code_of([*without_lam, "--steps", 6, *other, "--auto-resume", "--run-dir", finished]) == 2
    message = capsys.readouterr().err
    for told in (
        "alpha: run 16.0, now 3.0",
        "targets: run 'qv'",
        "method.name: run 'stable-lora'",
        "dtype:",
        "weight_decay:",
    ):
        assert told in message
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


def test_a_model_that_devices_share_never_lies_whole_on_one(train_flags, tmp_path, monkeypatch, capsys, eight_devices):
    models = []

    def spy(model, *args, **kwargs):
        params = nnx.state(model, nnx.filterlib.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
        models.append([leaf.sharding for leaf in jax.tree.leaves(params)])
        return training.train(model, *args, **kwargs)

    monkeypatch.setattr("stable_lora_jax.finetune.run.train", spy)
    flags, local = [*train_flags, "--steps", 2, "--dropout", 0.1], jax.local_devices
    mesh = ["--mesh", "data=2,fsdp=2"]
    # Read part by part to its device; what is quantized before stays on the host.
    assert code_of([*flags, *mesh, "--run-dir", tmp_path / "parts"]) == 0
    assert all(each.device_set == set(eight_devices[:4]) for each in models[0])
    assert any("fsdp" in each.spec for each in models[0])
    quantized = [*flags, "--quantize", "nf4"]
    assert code_of([*quantized, *mesh, "--run-dir", tmp_path / "first"]) == 0
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: eight_devices[7:] if backend else local())
    assert code_of([*quantized, *mesh, "--run-dir", tmp_path / "host"]) == 0
    assert all(each.device_set == {eight_devices[7]} for each in models[2])
    adapters = [(tmp_path / run / "adapter.safetensors").read_bytes() for run in ("first", "host")]
    assert adapters[0] == adapters[1]
    assert code_of([*flags, "--steps", 1, "--run-dir", tmp_path / "single"]) == 0
    assert all(each.device_set == {eight_devices[0]} for each in models[3])

    def without_cpu(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", without_cpu)
    assert code_of([*flags, *mesh, "--run-dir", tmp_path / "none"]) == 2
    assert "leaves out the CPU, where a model that 4 devices share is loaded" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_a_run_kept_out_is_scored(train_flags, model_dir, data_file, finished, tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "scores.json"
    assert code_of([*train_flags, "--holdout", 8, "--steps", 1, "--run-dir", run]) == 0
    held = ["eval", "--split", "holdout", "--output", output]
    assert code_of([*held, "--data", data_file, "--adapter", run]) == 0
    scores = json.loads(output.read_text())
    held_out = encode_all(load_tokenizer(str(model_dir)), hold_out(load_jsonl(data_file), 8)[1])
    assert scores == evaluate(load_with_adapter(str(model_dir), run), held_out).summary()
    assert scores["questions"] == 8
    changed = tmp_path / "changed.jsonl"
    shutil.copy(data_file, changed)
    record = json.loads((run / "config.json").read_text())
    twin = tmp_path / "twin"
    shutil.copytree(run, twin)
    (twin / "config.json").write_text(json.dumps(with_data(record, changed)))
    with changed.open("a") as file:
        file.write(data_file.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    assert code_of([*held, "--data", changed, "--adapter", twin]) == 2
    assert f"{changed} is not as it was when {twin} was trained" in capsys.readouterr().err
    for arguments, told in (
        (["--data", data_file, "--adapter", finished], "there is no run that did"),
        (["--data", data_file], "there is no run that did"),
        (["--adapter", run], f"give --data {data_file}, not arc_easy"),
    ):
        assert code_of([*held, *arguments]) == 2
        assert told in capsys.readouterr().err


def test_adapter_of_another_base_is_refused(finished, model_dir, data_file, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    assert code_of(["eval", "--model", other, "--data", data_file, "--adapter", finished]) == 2
    assert "does not belong to this model" in (message := capsys.readouterr().err)
    assert str(other) in message
    (other / "model.safetensors").unlink()  # told before the base is read
    output = tmp_path / "scores.json"
    assert code_of(["eval", "--model", other, "--data", data_file, "--adapter", finished, "--output", output]) == 2
    assert capsys.readouterr().err == message
    assert not output.exists()


def test_a_base_that_was_moved_is_known_by_its_name(finished, model_dir, data_file, tmp_path, capsys):
    moved, scores = tmp_path / model_dir.name, []
    shutil.copytree(model_dir, moved)
    for base in (model_dir, moved):
        capsys.readouterr()
        assert code_of(["eval", "--model", base, "--data", data_file, "--adapter", finished]) == 0
        captured = capsys.readouterr()
        scores.append(json.loads(captured.out))
        told = f"adapter.safetensors: trained on {model_dir}, loaded onto {base}" in captured.err
        assert told == (base == moved)
    assert scores[0] == scores[1]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    spec = read_adapter_spec(run / "adapter.safetensors")
    model = load_with_adapter(str(model_dir), run)
    save_adapter(run / "adapter.safetensors", model, f"/nowhere/{model_dir.name}")
    assert spec.base == str(model_dir)
    assert code_of(["export", run, tmp_path / "peft"]) == 2
    assert code_of(["export", run, tmp_path / "peft", "--model", model_dir]) == 0


def test_a_run_that_has_not_ended_has_no_adapter(finished, data_file, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "adapter.safetensors").unlink()
    for command in (["eval", "--data", data_file, "--adapter", run], ["export", run, tmp_path / "peft"]):
        assert code_of(command) == 2
        assert f"The run in {run} has no adapter yet" in capsys.readouterr().err


def test_without_a_login_nothing_is_deleted(train_flags, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = snapshot(run)
    nobody = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    flags = [*train_flags, "--steps", 2, "--run-dir", run, "--overwrite", "--log", "wandb"]
    command = [sys.executable, "-m", "stable_lora_jax.cli", *map(str, flags)]
    ended = subprocess.run(
        command, env=nobody | {"HOME": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "No API key configured" in ended.stderr
    assert "WANDB_MODE=offline" in ended.stderr
    assert snapshot(run) == before


def test_a_run_goes_on_with_its_own_data_alone(train_flags, finished, data_file, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "sums.jsonl"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(with_data(config, file)))
    flags = [*train_flags, "--data", file, "--steps", 6, "--run-dir", run]
    shutil.copy(data_file, file)
    assert code_of([*flags, "--resume"]) == 0
    capsys.readouterr()
    file.write_text(data_file.read_text().replace("3+5?", "5+3?"))
    for how in ("--resume", "--auto-resume"):
        assert code_of([*flags, how]) == 2
        message = capsys.readouterr().err
        assert f"was started on other data (examples_sha256: run '{config['examples_sha256']}', now" in message
        assert "total_steps" not in message


def last_step(metrics) -> int:
    return max((line["step"] for line in read_metrics(metrics) if "loss" in line), default=0)


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ({"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "smollm2-135m"),
        ({"base_model_name_or_path": "Qwen/Qwen2-0.5B"}, "Qwen/Qwen2-0.5B"),
        ({}, "smollm2-135m"),
    ],
)
def test_a_peft_directory_names_its_base(tmp_path, named, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    assert base_of(None, tmp_path) == base
    assert base_of("other", tmp_path) == "other"
