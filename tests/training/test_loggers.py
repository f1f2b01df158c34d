"""TensorBoard and Weights & Biases get what metrics.jsonl gets; read back from their own files."""

import struct
from pathlib import Path

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
    content = file.read_bytes()
    for name in (b"loss", b"grad_norm", b"norm_a", b"gap"):
        assert name in content


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"log='x' is unknown. Known: tensorboard, wandb"):
        check_logger("x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tensorboardX. Install stable-lora-jax\[tensorboard\]"):
        check_logger("tensorboard")
