"""The kill test itself, with few kills."""

from experiments.benchmarks.kill_test import KillConfig, run


def test_killed_trainings_end_with_the_bits_of_an_undisturbed_one(tmp_path):
    result = run(KillConfig(kills=4, steps=12), tmp_path)
    assert result["sigkill"] >= 4
    assert result["whole_checkpoints_read"] >= 4
    assert result["megabits_compared"] > 0.1
