"""The authors' own optimizer, replayed: A, B and the flags must agree at every step (see tests/golden)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax import stable_lora
from tests.golden.condense import probe

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
# float32: the traces themselves move by 1e-6 when their gradients are perturbed by one unit in the last place.
TOLERANCE = {"f32": 2e-5, "f64": 1e-12}


def optimizer(case):
    hyper = case["hyperparameters"]
    schedule = case["lr_schedule"]
    lr = hyper["lr"] if schedule is None else lambda step: jnp.asarray(schedule)[step]
    adamw = optax.adamw(lr, *hyper["betas"], eps=hyper["eps"], weight_decay=hyper["weight_decay"])
    return {"adamw": adamw, "stable_lora": stable_lora(adamw, hyper.get("shrink_ratio", 0.0))}[case["method"]]


def gradients(case, trace, dtype, step, params):
    """The stored gradients, or in float64 the gradients at `params` of mean_batch sum_rows ((W0 + s B A) X - Y)^2."""
    for pair, (a, b) in enumerate((p["lora_A"], p["lora_B"]) for p in params.values()):
        if dtype == "f32":
            yield trace[f"f32.gA.{pair}"][step], trace[f"f32.gB.{pair}"][step]
        else:
            w, x, y = (trace[f"{name}.{pair}"].astype(np.float64) for name in ("W0", "X", "Y"))
            z = 2 * case["s"] / x.shape[1] * ((w + case["s"] * b @ a) @ x - y) @ x.T
            yield b.T @ z, z @ a.T


def replay(case, trace, dtype):
    """Returns the parameters after every step and the flags kept (True: still shrinking), (steps, pairs)."""
    tx = optimizer(case)
    width = {"f32": jnp.float32, "f64": jnp.float64}[dtype]
    pairs = range(len(case["pairs"]))
    names = [f"layers.{pair}" for pair in pairs]
    params = {
        names[i]: {"lora_A": jnp.asarray(trace[f"A0.{i}"], width), "lora_B": jnp.asarray(trace[f"B0.{i}"], width)}
        for i in pairs
    }
    state, step_fn = tx.init(params), jax.jit(tx.update)
    history, keep = [], []
    for step in range(case["steps"]):
        grads = gradients(case, trace, dtype, step, jax.tree.map(np.asarray, params))
        grads = {
            name: {"lora_A": jnp.asarray(a), "lora_B": jnp.asarray(b)}
            for name, (a, b) in zip(names, grads, strict=True)
        }
        updates, state = step_fn(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.tree.map(np.asarray, params))
        if case["method"] == "stable_lora":
            keep.append([not bool(state[0].stable[f"{name}/lora"]) for name in names])
    return names, history, np.array(keep)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in c["dtypes"]],
    ids=lambda v: v if isinstance(v, str) else v["name"],
)
def test_equals_the_authors_trace(case, dtype):
    trace = np.load(GOLDEN / f"{case['name']}.npz")
    with jax.enable_x64(dtype == "f64"):
        names, history, keep = replay(case, trace, dtype)
    if case["method"] == "stable_lora":
        np.testing.assert_array_equal(keep, trace[f"{dtype}.keep"])
    for pair, name in enumerate(names):
        for side in "AB":
            ours = np.stack([params[name][f"lora_{side}"] for params in history])
            last = trace[f"{dtype}.{side}.{pair}.last"]
            assert np.linalg.norm(ours[-1] - last) <= TOLERANCE[dtype] * np.linalg.norm(last)
            # The root mean square of 8 probes is within a factor 3 of the Frobenius norm.
            off = np.sqrt(np.mean((probe(ours) - trace[f"{dtype}.{side}.{pair}.probes"]) ** 2, axis=1))
            norms = np.linalg.norm(ours.astype(np.float64), axis=(1, 2))
            assert np.all(off <= TOLERANCE[dtype] * norms), (side, int(np.argmax(off / norms)), np.max(off / norms))
