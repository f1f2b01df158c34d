"""Options from a YAML file are the command line's, and --print-config writes one that says the same."""

import json

import pytest

from stable_lora_jax.cli import main

OPTIONS = """\
data: {data}
model: {model}
rank: 2
learning_rate: 1e-3
steps: 3
pack: false
batch_size: 4
log: []
mesh: ''
lam: null
"""


@pytest.fixture
def file(model_dir, data_file, tmp_path):
    (tmp_path / "run.yaml").write_text(OPTIONS.format(data=data_file, model=model_dir))
    return tmp_path / "run.yaml"


def trained(run):
    return json.loads((run / "config.json").read_text())["config"]


def test_a_file_is_the_command_line(file, model_dir, data_file, tmp_path):
    assert main(["train", "--config", str(file), "--run-dir", str(tmp_path / "file")]) == 0
    line = f"--data {data_file} --model {model_dir} --rank 2 --learning-rate 1e-3 --steps 3 --no-pack --batch-size 4"
    assert main(["train", *line.split(), "--run-dir", str(tmp_path / "line")]) == 0
    assert trained(tmp_path / "file") == trained(tmp_path / "line")
    assert main(["train", f"--config={file}", "--rank", "3", "--run-dir", str(tmp_path / "over")]) == 0
    assert trained(tmp_path / "over")["adapter"]["rank"] == 3


def test_what_is_printed_is_read_again(file, tmp_path, capsys):
    assert main(["train", "--config", str(file), "--method", "lora-plus", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "method: lora-plus\n" in printed
    assert "ratio: 4.0\n" in printed
    (tmp_path / "again.yaml").write_text(printed)
    assert main(["train", "--print-config", "--config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 8\n", "unknown options rnak. Known: a_scale, accumulate,"),
        ("rank: 8\nrank: 4\n", "rank is given more than once"),
        ("rank: [8\n", "is not YAML"),
        ("- rank\n", "contains list, not options"),
        ("", "contains NoneType, not options"),
        ("rank: {a: 1}\n", "rank is {'a': 1}. It must be a text, a number"),
        ("config: other.yaml\n", "unknown options config"),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_other_wrong_uses(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["train", "--config", "a.yaml", "--config", "b.yaml"]) == 2
    assert "--config is given 2 times" in capsys.readouterr().err
