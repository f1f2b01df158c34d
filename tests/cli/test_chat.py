"""Conversations from the file to the answer: trained on, validated on, asked, and exported."""

import json
import shutil

import numpy as np
import pytest

from stable_lora_jax.cli import main
from stable_lora_jax.data import encode_all, load_jsonl, load_tokenizer
from stable_lora_jax.training import read_metrics

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(a, b):
    messages = [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": str(a + b)}]
    return {"messages": [{"role": "system", "content": "Add."}, *messages, *messages]}


@pytest.fixture(scope="module")
def model(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / model_dir.name
    shutil.copytree(model_dir, directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    file.write_text("".join(json.dumps(chat(a, b)) + "\n" for a in range(6) for b in range(4)))
    return file


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "chat"
    flags = ["--holdout", 4, "--eval-every", 2, "--keep-best", "--steps", 4, "--batch-size", 4, "--rank", 2]
    assert code_of(["train", "--model", model, "--data", data, "--run-dir", directory, *flags]) == 0
    return directory


def code_of(arguments):
    return main([str(argument) for argument in arguments])


def test_a_conversation_is_learnt_validated_and_asked(run, model, data, tmp_path, capsys):
    record = json.loads((run / "config.json").read_text())
    assert record["form"] == "chat"
    validations = [line["validation"] for line in read_metrics(run / "metrics.jsonl") if "validation" in line]
    assert len(validations) == 2
    assert all(each.keys() == {"loss"} for each in validations)
    asked = ["generate", "--adapter", run, "--prompt", "1+1?", "--max-new-tokens", 4]
    assert code_of(asked) == 0
    answer = capsys.readouterr().out
    assert code_of([*asked, "--form", "chat"]) == 0
    assert capsys.readouterr().out == answer
    # Many from a file: the same answer as alone, and conversations as they stand.
    (tmp_path / "prompts.txt").write_text("1+1?\n\n2+3?\n")
    many = ["generate", "--adapter", run, "--max-new-tokens", 4, "--prompts"]
    assert code_of([*many, tmp_path / "prompts.txt"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["1+1?", "2+3?"]
    assert lines[0]["answer"] + "\n" == answer
    messages = [{"role": "user", "content": "1+1?"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages}) + '\n{"prompt": "1+1?"}\n')
    assert code_of([*many, tmp_path / "prompts.jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"messages": messages, "answer": answer[:-1]}, {"prompt": "1+1?", "answer": answer[:-1]}]
    assert code_of([*many, tmp_path / "prompts.jsonl", "--form", "raw"]) == 2
    assert "holds messages, which only a chat template makes a text of" in capsys.readouterr().err
    # Stops before a text.
    assert len(answer) > 2
    assert code_of([*asked, "--stop", answer[1]]) == 0
    assert capsys.readouterr().out == answer[: answer.index(answer[1])] + "\n"


def test_what_conversations_are_not_for(run, model, data, tmp_path, capsys):
    assert code_of(["eval", "--adapter", run, "--data", data]) == 2
    assert "eval needs questions" in capsys.readouterr().err
    chosen = ["train", "--model", model, "--data", data, "--loss", "choices", "--run-dir", tmp_path / "run"]
    assert code_of(chosen) == 2
    assert "contains conversations. Leave --loss out for them" in capsys.readouterr().err


def test_too_long_ones_are_refused_cut_or_skipped(model, data, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    long = chat(1, 1)
    long["messages"][1] = {"role": "user", "content": "please " * 30 + "1+1?"}
    file.write_text(json.dumps(long) + "\n" + data.read_text())
    examples = encode_all(load_tokenizer(model), load_jsonl(file))
    limit = max(example.length for example in examples[1:])
    flags = ["train", "--model", model, "--data", file, "--steps", 1, "--batch-size", 25, "--max-length", limit]
    assert code_of([*flags, "--run-dir", tmp_path / "refused"]) == 2
    assert f"1 of 25 examples take more than max_length={limit} tokens" in capsys.readouterr().err
    assert code_of([*flags, "--too-long", "truncate", "--run-dir", tmp_path / "cut"]) == 0
    assert f"1 of 25 examples take more than {limit} tokens and are cut at their beginning" in capsys.readouterr().out
    assert code_of([*flags, "--too-long", "skip", "--run-dir", tmp_path / "skipped"]) == 2  # 24 are no batch of 25
    told = capsys.readouterr()
    assert "1 of 25 examples take more than" in told.out
    assert "left out" in told.out


def test_columns_of_a_data_set(model, data, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        {"instruction": f"{a}+{b}=", "output": str(a + b), "source": "made up", "turns": chat(a, b)["messages"]}
        for a in range(6)
        for b in range(4)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["train", "--model", model, "--data", f"hub:{folder}", "--steps", 1, "--batch-size", 4]
    assert code_of([*flags, "--map", "prompt=instruction,completion=output", "--run-dir", tmp_path / "pairs"]) == 0
    assert code_of([*flags, "--map", "messages=turns", "--run-dir", tmp_path / "turns"]) == 0
    direct = [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--steps",
        1,
        "--batch-size",
        4,
        "--run-dir",
        tmp_path / "file",
    ]
    assert code_of(direct) == 0
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[1]["loss"] for name in ("turns", "file")]
    assert np.ptp(losses) == 0
    capsys.readouterr()
    for wrong, message in (
        ([], "row 0: missing field prompt, completion"),
        (["--map", "prompt=question"], "has no column question; it has instruction, output, source, turns"),
    ):
        assert code_of([*flags, *wrong, "--run-dir", tmp_path / "wrong"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit, match="2"):
        code_of([*flags, "--map", "prompt"])
    assert "is not understood. Write field=column" in " ".join(capsys.readouterr().err.split())


def test_columns_of_questions_are_those_that_were_trained_on(model, tmp_path, capsys):
    folder, renamed = tmp_path / "set", {"question": "asked", "choices": "options", "answer_index": "right"}
    folder.mkdir()
    sums = [(a, b) for a in range(6) for b in range(4)]
    rows = [{"question": f"{a}+{b}=", "choices": [str(a + b), "x"], "answer_index": 0} for a, b in sums]
    direct = tmp_path / "direct.jsonl"
    direct.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps({renamed[name]: value for name, value in row.items()}) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    hub, columns = f"hub:{folder}", ",".join(f"{field}={column}" for field, column in renamed.items())
    flags = ["train", "--model", model, "--steps", 1, "--batch-size", 4, "--run-dir", tmp_path / "run"]
    assert code_of([*flags, "--data", hub, "--map", columns, "--holdout", 4]) == 0
    capsys.readouterr()
    held_out = ["eval", "--adapter", tmp_path / "run", "--data", hub, "--split", "holdout"]
    for asked, code in (([], 0), (["--map", columns], 0), (["--map", columns.replace("right", "wrong")], 2)):
        assert code_of([*held_out, *asked]) == code
    assert "Leave --map out" in capsys.readouterr().err
    scores = []
    for asked in (
        ["--data", direct],
        ["--data", hub, "--split", "train"],  # as it was trained
        ["--data", hub, "--split", "train", "--map", columns],
    ):
        assert code_of(["eval", "--adapter", tmp_path / "run", *asked]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1] == scores[2]
    assert code_of(["eval", "--model", model, "--data", hub, "--split", "train"]) == 2
    assert "--map" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        code_of(["eval", "--data", direct, "--map", columns])
    assert "Leave it out for" in " ".join(capsys.readouterr().err.split())
