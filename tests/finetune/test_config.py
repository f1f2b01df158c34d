"""Every option that decides what is computed reaches the update, the length of the run and the adapter."""

import jax.numpy as jnp
import numpy as np
import pytest

from stable_lora_jax.finetune import RunConfig, total_steps, update_rule
from stable_lora_jax.lora import read_adapter_spec
from tests.cli.test_cli import code_of


def rule_of(config):
    method = config.method
    return update_rule(config, 8, config.schedule.learning_rate, method.lam, method.ratio, method.weight_decay)


def shrinks(config, b):
    """Returns what is added to an A of ones in each of four steps without a gradient."""
    tx, _ = rule_of(config)
    params = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.full((2, 4), b)}
    state, zeros, found = tx.init(params), {"lora_a": jnp.zeros((8, 2)), "lora_b": jnp.zeros((2, 4))}, []
    for _ in range(4):
        updates, state = tx.update(zeros, state, params)
        found.append(float(updates["lora_a"][0, 0]))
    return found


@pytest.mark.parametrize(
    ("config", "b", "expected"),
    [
        (RunConfig.of(lam=0.5), 0.0, [-0.5] * 4),
        (RunConfig.of(lam=0.5, lam_schedule="linear"), 0.0, [-0.5, -0.4375, -0.375, -0.3125]),
        (RunConfig.of(lam=0.5), 9.0, [0.0] * 4),  # ‖A‖/8 is below ‖B‖/4
        (RunConfig.of(lam=0.5, stop_when_stable=False), 9.0, [-0.5] * 4),
        (RunConfig.of(method="adamw"), 0.0, [0.0] * 4),
        (RunConfig.of(method="adamw", weight_decay=200.0, decay_only_a=True, schedule="constant"), 0.0, [-0.1] * 4),
    ],
)
def test_the_update_is_the_configurations(config, b, expected):
    np.testing.assert_allclose(shrinks(config, b), expected, atol=1e-6)


def test_the_learning_rate_is_the_configurations():
    config = RunConfig.of(learning_rate=0.8, warmup=0.25, schedule="linear")
    _, rate = rule_of(config)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 5, 8)], [0, 0.4, 0.8, 0.4, 0], atol=1e-6)


def test_the_length_is_the_configurations():
    assert [total_steps(RunConfig.of(epochs=epochs), 10) for epochs in (0.01, 1.0, 2.5)] == [1, 10, 25]
    assert total_steps(RunConfig.of(epochs=2.5, steps=3), 10) == 3


def test_the_adapter_is_the_configurations(model_dir, data_file, tmp_path):
    flags = ["--rank", 3, "--alpha", 5, "--use-rslora", "--targets", "qkvo", "--remat", "--unroll", "True"]
    flags += ["--steps", 1]
    assert code_of(["train", "--model", model_dir, "--data", data_file, *flags, "--run-dir", tmp_path / "run"]) == 0
    spec = read_adapter_spec(tmp_path / "run" / "adapter.safetensors")
    assert (spec.rank, spec.alpha, spec.use_rslora, len(spec.targets)) == (3, 5.0, True, 4)
