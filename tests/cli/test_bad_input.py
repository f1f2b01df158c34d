"""Every bad input ends with exit code 2 and a message that says what came, and leaves everything as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stable_lora_jax.cli import main

QUESTION = {"question": "1+1?", "choices": ["02", "03"], "answer_index": 0}
COMPLETION = {"prompt": "1+1?", "completion": "2"}


def refuse(capsys, arguments) -> str:
    """Runs a command that must be refused, and returns what it told."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # the parser's own refusal
        code = error.code
    assert code == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in told
    assert len(told) > 20
    return told


def snapshot(directory: Path) -> dict[Path, Any]:
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture
def flags(model_dir, data_file, tmp_path):
    """A training that would replace the run in tmp_path/run, if it were not refused."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("adapter")
    (run / "checkpoints").mkdir()
    (run / "config.json").write_text(json.dumps({"config": {}}))
    return [
        *("train", "--model", model_dir, "--data", data_file, "--rank", 2, "--batch-size", 4, "--steps", 6),
        *("--overwrite", "--run-dir", run),
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # names
        ("--method x", "invalid choice 'x' for argument '--method'. Expected one of"),
        ("--data x", "data='x' is unknown. Known: arc_easy"),
        ("--data x.csv", "data='x.csv' is unknown"),
        ("--data none.jsonl", "No such file or directory: 'none.jsonl'"),
        ("--model x", "no tokenizer 'x': allowed are 'smollm2-135m', an existing .gguf file"),
        ("--loss x", "invalid choice 'x' for argument '--loss'. Expected one of"),
        ("--prompt-format x", "invalid choice 'x' for argument '--prompt-format'. Expected one of"),
        ("--lam-schedule x", "invalid choice 'x' for argument '--lam-schedule'"),
        ("--run-dir s3://bucket/run", "s3:/bucket/run is a URL"),
        ("--schedule x", "invalid choice 'x' for argument '--schedule'. Expected one of"),
        ("--dtype x", "invalid choice 'x' for argument '--dtype'. Expected one of"),
        ("--source x", "invalid choice 'x' for argument '--source'. Expected one of ('wheel', 'hub')"),
        ("--targets x", "LoRA targets ['x'] match no layer"),
        ("--targets (", "LoRA targets '(' are no regular expression"),
        ("--nonsense 1", "Unrecognized options: --nonsense"),
        ("--steps many", "Error parsing --steps: no type matching"),
        # numbers
        ("--lam 1.0", "lam=1.0 is not in [0, 1)"),
        ("--lam -0.1", "lam=-0.1 is not in [0, 1)"),
        ("--lam nan", "lam=nan is not in [0, 1)"),
        ("--lam-schedule cosine --lam 2", "lam=2.0 is not in [0, 1)"),
        ("--holdout 24", "hold out 24 of 24"),
        (
            "--decay-only-a True --weight-decay 1 --method lora-rite",
            "decay_only_a=True belongs to adamw and stable-lora; method='lora-rite' has none",
        ),
        ("--method lora-plus --ratio -4", "ratio=-4.0 is not in [0, inf)"),
        ("--learning-rate -1", "learning_rate=-1.0 is not in [0, inf)"),
        ("--learning-rate nan", "learning_rate=nan is not in [0, inf)"),
        ("--weight-decay -1", "weight_decay=-1.0 is not in [0, inf)"),
        ("--clip-norm 0", "clip_norm=0.0 is not above 0"),
        ("--warmup 1.0", "warmup=1.0 is not in [0, 1)"),
        ("--warmup -1", "warmup=-1.0 is not in [0, 1)"),
        ("--warmup inf", "warmup=inf is not in [0, 1)"),
        ("--warmup nan", "warmup=nan is not in [0, 1)"),
        ("--rank 0", "rank=0 is not a positive integer"),
        ("--alpha 0", "alpha=0.0 is not a positive number"),
        ("--alpha inf", "alpha=inf is not a positive number"),
        ("--dropout 1.0", "dropout=1.0 is not in [0, 1)"),
        ("--seed -1", "seed is -1; allowed are integers from 0"),
        ("--steps 0", "steps=0 is below 1"),
        ("--epochs 0", "epochs=0.0 is not a positive number"),
        ("--batch-size 0", "batch_size is 0; allowed are 1 to the number of examples, 24"),
        ("--batch-size 25", "batch_size is 25; allowed are 1 to the number of examples, 24"),
        ("--accumulate 3", "A batch of 4 rows does not split into accumulate=3 equal parts"),
        ("--accumulate 0", "A batch of 4 rows does not split into accumulate=0 equal parts"),
        ("--method adamw --stop-when-stable False", "belongs to stable-lora; method='adamw' has none"),
        ("--method adamw --lam 0.1", "lam=0.1 belongs to stable-lora; method='adamw' has none"),
        ("--decay-only-a True", "weight_decay is 0. Give --weight-decay too"),
        ("--source hub", "source='hub' is for tasks"),
        ("--max-length 4", "examples take more than max_length=4 tokens, up to "),
        ("--save-every 0", "save_every=0 is below 1"),
        ("--norms-every 0", "norms_every=0 is below 1"),
        # devices
        ("--mesh x=2", "mesh='x=2' is not understood at 'x=2'. Write e.g. data=4,fsdp=2,tensor=1"),
        ("--mesh data=2,data=4", "mesh='data=2,data=4' is not understood at 'data=4'"),
        ("--mesh data=0", "data=0, fsdp=1, tensor=1 needs 0 devices"),
        ("--mesh data=9", "needs 9 devices; there are 8"),
        ("--processes 0", "coordinator=None, processes=0, process_id=None: only some are given"),
        ("--mesh data=8", "A batch of 4 rows does not split evenly over data=8"),
        ("--mesh data=4 --accumulate 2", "A batch of 4 rows in accumulate=2 parts has 2 rows a part"),
    ],
)
def test_arguments(flags, tmp_path, capsys, changes, told):
    before = snapshot(tmp_path)
    assert told in refuse(capsys, [*flags, *changes.split()])
    assert snapshot(tmp_path) == before


def test_completions_have_no_choices(flags, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text(4 * (json.dumps(COMPLETION) + "\n"))
    before = snapshot(tmp_path)
    told = refuse(capsys, [*flags, "--data", file, "--loss", "choices"])
    assert "loss='choices' compares answers; " in told
    assert "data.jsonl contains completions" in told
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "holds no line; at least one is needed"),
        ([QUESTION, "{'question': 1}"], "line 2: invalid JSON"),
        ([QUESTION, b"\xff\xfe"], "line 2: invalid JSON"),
        ([QUESTION, [1]], "line 2: a JSON list, not an object"),
        ([QUESTION, COMPLETION], "line 2: a completion, but the lines before hold another kind"),
        ([QUESTION | {"answer_index": 2}], "line 1: answer_index is 2, but the choices are 0 to 1"),
        ([QUESTION | {"answer_index": "0"}], "line 1: answer_index is '0', not of type int"),
        ([QUESTION | {"choices": ["02"]}], "line 1: 1 choices, but at least 2 are needed"),
        ([QUESTION | {"choices": ["02", ""]}], "line 1: choice 1 is '', not a text"),
        ([QUESTION | {"label": 0}], "line 1: unknown field label"),
        ([{"prompt": "1+1?"}], "line 1: missing field completion"),
        ([QUESTION] * 3, "batch_size is 4; allowed are 1 to the number of examples, 3"),
        ([QUESTION | {"question": 300 * "1"}] * 4, "takes 320 positions; the model has 256"),
    ],
)
def test_data_files(flags, tmp_path, capsys, lines, told):
    file = tmp_path / "data.jsonl"
    file.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
    )
    before = snapshot(tmp_path)
    assert told in refuse(capsys, [*flags, "--data", file])
    assert snapshot(tmp_path) == before


def without_configuration(model: Path) -> None:
    (model / "config.json").unlink()


def with_a_damaged_configuration(model: Path) -> None:
    (model / "config.json").write_text("{")


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def of_another_architecture(model: Path) -> None:
    change_configuration(model, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def with_another_width(model: Path) -> None:
    change_configuration(model, intermediate_size=41)


def with_a_small_vocabulary(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    small = {name: x[:40] if "embed" in name or "lm_head" in name else x for name, x in tensors.items()}
    save_file({name: np.ascontiguousarray(x) for name, x in small.items()}, model / "model.safetensors")
    change_configuration(model, vocab_size=40)


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors")


def without_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")


def without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def change_configuration(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_configuration, "config.json does not exist"),
        (with_a_damaged_configuration, "config.json' is not a valid JSON file"),
        (without_weights, "lacks model.safetensors; weights are"),
        (of_another_architecture, "GPT2LMHeadModel"),
        (with_another_width, "the configuration asks for"),
        (with_a_small_vocabulary, "the model knows 0 to 39. The tokenizer belongs to another model"),
        (cut_short, "model.safetensors is not a whole safetensors file: "),
        (with_nan, "The model's norm.scale holds NaN or infinity"),
        (without_a_tensor, "lacks 1 tensors: model.norm.weight"),
        (without_tokenizer, "Allowed are a folder with tokenizer files"),
    ],
)
def test_models(flags, model_dir, tmp_path, capsys, damage: Callable[[Path], None], told):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    damage(model)
    before = snapshot(tmp_path)
    assert told in refuse(capsys, [*flags, "--model", model])
    assert snapshot(tmp_path) == before


def test_places(flags, tmp_path, model_dir, data_file, capsys):
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    start = [flag for flag in flags if flag != "--overwrite"]
    assert "is not empty. Resume with --resume" in refuse(capsys, start)
    assert "no run to resume in" in refuse(capsys, [*start, "--resume", "--run-dir", tmp_path / "none"])
    assert "is a file" in refuse(capsys, [*start, "--run-dir", tmp_path / "file"])
    assert "Not a directory" in refuse(capsys, [*start, "--run-dir", tmp_path / "file" / "run"])
    score = ["eval", "--model", model_dir, "--data", data_file]
    assert "No such file or directory" in refuse(capsys, [*score, "--output", tmp_path / "none" / "scores.json"])
    assert "no adapter file" in refuse(capsys, [*score, "--adapter", tmp_path / "none"])
    assert "not a readable safetensors file" in refuse(capsys, [*score, "--adapter", tmp_path / "file"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("record", ["{", "{}", '{"config": 1}'])
def test_records_that_are_none(flags, tmp_path, capsys, record):
    (tmp_path / "run" / "config.json").write_text(record)
    before = snapshot(tmp_path)
    start = [flag for flag in flags if flag != "--overwrite"]
    assert "config.json does not hold a run's configuration" in refuse(capsys, [*start, "--resume"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("eval --data x", "data='x' is unknown"),
        ("eval --split x", "split 'x'"),
        ("eval --source hub --data x.jsonl", "source='hub' is for tasks"),
        ("eval --split test --data x.jsonl", "split='test' is for tasks; x.jsonl is scored whole"),
        ("eval --dtype x", "dtype='x' is unknown"),
        ("eval --prompt-format x", "prompt_format='x' is unknown. Known: cloze, letter"),
        ("eval --limit 0", "limit=0 is below 1"),
        ("eval --model x", "no tokenizer 'x'"),
        ("generate --prompt a --model x", "no tokenizer 'x'"),
        ("generate --prompt a --model MODEL --max-new-tokens 0", "max_new_tokens=0 after a prompt of 1"),
        ("generate --prompt a --model MODEL --max-new-tokens 256", "positions allow 1 to 255"),
        ("generate --prompt a --model MODEL --temperature -1", "temperature=-1.0 with key=None"),
        ("generate --prompt a --model MODEL --temperature nan", "temperature=nan with key=None"),
        ("generate --prompt a --model MODEL --temperature inf", "temperature=inf with key="),
        ("plan --estimate --model smollm2-135m --targets-per-row 0", "num_targets=0 is below 1"),
        ("generate --prompt a --model MODEL --form chat", "the tokenizer MODEL has no chat template"),
        ("export x y", "no adapter file"),
        ("export x y --format merged --base z", "base says nothing about merged"),
        ("export x y --dtype bfloat16", "dtype says nothing about peft"),
        ("export x y --format gguf --base z", "base says nothing about gguf"),
        ("export x y --format onnx", "format='onnx' is unknown. Known: peft, gguf, merged"),
        ("export-plots", "no run directory"),
        ("export-plots x", "x holds no metrics.jsonl"),
        ("export-plots x --file-format gif", "file_format='gif' is unknown. Known: png, svg, pdf"),
        ("x", "train, eval, generate, export, export-plots"),
    ],
)
def test_other_commands(capsys, model_dir, arguments, told):
    arguments, told = (text.replace("MODEL", str(model_dir)) for text in (arguments, told))
    assert told in refuse(capsys, arguments.split())
