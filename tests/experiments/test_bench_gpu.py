"""A benchmark that is run again measures what is missing, then what failed, on its own machine."""

import json
import sys

import pytest

from experiments import bench_gpu


def test_missing_cells_come_before_failed_ones():
    first, second, *rest = bench_gpu.cells(tiny=True)
    measured = [{"cell": first, "failed": "time"}, {"cell": second, "tokens_per_second": 1.0}]
    assert bench_gpu.waiting(measured, tiny=True) == [*rest, first]
    assert bench_gpu.waiting(json.loads(json.dumps(measured)), tiny=True) == [*rest, first]  # as a file has them


def test_a_file_of_another_machine_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "bench_gpu.json"
    file.write_text(json.dumps({"machine": {"cpu": "another", "cores": 1, "architecture": "x"}, "cells": []}))
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--tiny", "--out", str(file)])
    with pytest.raises(SystemExit, match=r"another machine .* give another file: --out FILE"):
        bench_gpu.main(bench_gpu.arguments())


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("Traceback:\n  File x\nValueError: rank\n-----\nFor simplicity, JAX removed frames.\n", "ValueError: rank"),
        ("a.b.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory\n  buffers:\n", "a.b.XlaRuntimeError: RESOURCE_EXHA"),
        ("SystemExit: no GPU\n\n", "SystemExit: no GPU"),
        ("Killed\n", "Killed"),
        ("", ""),
    ],
)
def test_reason_of_a_failure_is_its_error(stderr, told):
    assert bench_gpu.reason(stderr).startswith(told)
    assert bool(told) == bool(bench_gpu.reason(stderr))
