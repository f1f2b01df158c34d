"""The share of a step in which the device idles, of a real run's trace."""

import json

from experiments.benchmarks.idle_share import SKIPPED, IdleShareConfig, gaps, main


def test_gaps_are_what_nothing_covers():
    busy = [(0.0, 2.0), (6.0, 9.0), (1.0, 3.0), (5.0, 6.0)]
    assert gaps(busy, 1.0, 8.0) == [(3.0, 5.0)]
    assert gaps(busy, 1.0, 12.0) == [(3.0, 5.0), (9.0, 12.0)]
    assert gaps([], 1.0, 2.0) == [(1.0, 2.0)]


def test_a_run_is_traced_and_measured(model_dir, data_file, tmp_path):
    out = tmp_path / "idle_share.json"
    main(IdleShareConfig(model=str(model_dir), data=str(data_file), dtype="float32", steps=10, out=out))
    found = json.loads(out.read_text())
    assert found["steps"] == 10 - SKIPPED - 1
    assert 0 < found["idle_share"] < 1
    assert found["longest_gaps_ms"][0] <= 1000 * found["seconds_per_step"] * found["steps"]
