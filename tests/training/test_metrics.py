"""metrics.jsonl survives kills and resumes."""

import json

import jax.numpy as jnp
import numpy as np

from stable_lora_jax.training import MetricsFile, read_metrics, stop_steps


def write(path, steps, resume_step=0):
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.write(step=step, loss=step / 2)
    file.close()


def test_resume_drops_later_lines_and_a_fresh_start_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    write(path, range(1, 6))
    write(path, [4], resume_step=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    write(path, [1])
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_cut_short_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    path.write_text(path.read_text()[:-5])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    write(path, [3], resume_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_line_can_be_read_as_soon_as_it_is_written_and_is_plain_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(step=1, loss=float("nan"), gap=jnp.array([[jnp.inf, 2.0]]), nested={"x": [np.float32("-inf"), True]})
    (text,) = path.read_text().splitlines()
    file.close()

    def refuse(name):
        raise AssertionError(name)

    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "gap": [[None, 2.0]], "nested": {"x": [None, True]}}


def test_stop_steps():
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 3, "pair": "q", "index": [2], "stable": True},
        {"step": 4, "pair": "q", "index": [0], "stable": True},
        {"step": 4, "pair": "head", "index": [], "stable": True},
    ]
    assert stop_steps(lines) == {"q": {(2,): 3, (0,): 4}, "head": {(): 4}}
