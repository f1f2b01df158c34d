"""TensorBoard and Weights & Biases get what metrics.jsonl gets; read back from their own files."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stable_lora_jax.training import check_logger, read_metrics
from tests.training.test_loop import run


def tensorboard_records(directory: Path) -> dict[str, dict[int, object]]:
    """tag -> step -> number or histogram; a later file replaces the steps from where it starts."""
    from tensorboardX.proto import event_pb2

    found: dict[str, dict[int, object]] = {}
    for file in sorted(directory.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # a length of 8 bytes, its checksum of 4, the record, its checksum of 4
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event.session_log.START:
                found = {tag: {s: x for s, x in steps.items() if s < event.step} for tag, steps in found.items()}
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                content = value.histo if kind == "histo" else value.simple_value
                found.setdefault(value.tag, {})[event.step] = content
    return found


def wandb_records(file: Path) -> dict[int, dict[str, Any]]:
    """step -> name -> value, from the log of an offline run: 7 bytes, then records cut at blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    found: dict[int, dict[str, Any]] = {}
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the rest of the block is empty
            at += 2**15 - at % 2**15
            continue
        length, part = struct.unpack("<HB", data[at + 4 : at + 7])  # after a checksum; parts 1 whole, 2 first, 4 last
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            history = Record.FromString(record).history
            for item in history.item:
                name = item.key or "/".join(item.nested_key)  # a histogram is several items
                found.setdefault(history.step.num, {})[name] = json.loads(item.value_json)
            record = b""
    return found


def test_tensorboard(tmp_path):
    run(tmp_path, steps=3, loggers=["tensorboard"])
    run(tmp_path, steps=6, loggers=["tensorboard"], resume=True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found = tensorboard_records(tmp_path / "tensorboard")
    for field in ("loss", "grad_norm", "tokens_per_second", "stable"):
        expected = {line["step"]: line[field] for line in lines if "loss" in line}
        assert list(found[field]) == list(expected) == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(list(found[field].values()), list(expected.values()), rtol=1e-6)
    norms = {line["step"]: line["norms"] for line in lines if "norms" in line}
    for pair in norms[1]:
        values = norms[5][pair]["norm_a"]
        assert found[f"norms/{pair}/norm_a"][5] == pytest.approx(np.median(values), rel=1e-6)
        histogram = found[f"norms/{pair}/norm_a/histogram"][5]
        assert (histogram.num, histogram.sum) == (3, pytest.approx(sum(values), rel=1e-6))
        assert 5 in found[f"norms/{pair}/gap"]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, steps=3, loggers=["wandb"])
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert (tmp_path / "wandb-id").read_text() in file.name
    found = wandb_records(file)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for line in (line for line in lines if "loss" in line):
        for field in ("loss", "grad_norm", "stable"):
            assert found[line["step"]][field] == pytest.approx(line[field], rel=1e-6)
    (norms,) = (line["norms"] for line in lines if line["step"] == 3 and "norms" in line)
    for pair, values in norms.items():
        _, edges = np.histogram(values["norm_a"])
        assert found[3][f"norms/{pair}/norm_a/histogram/_type"] == "histogram"
        assert sum(found[3][f"norms/{pair}/norm_a/histogram/values"]) == 3
        assert found[3][f"norms/{pair}/norm_a/histogram/bins"] == pytest.approx(edges, rel=1e-6)
        assert found[3][f"norms/{pair}/gap"] == pytest.approx(np.median(values["gap"]), rel=1e-6)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"log='x' is unknown. Known: tensorboard, wandb"):
        check_logger("x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboardX. Run: pip install 'stable-lora-jax\[tensorboard\]'"):
        check_logger("tensorboard")
