"""The authors' own optimizer, replayed: A, B and the flags must agree at every step (see tests/golden)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stable_lora_jax import lora_plus, lora_rite, lora_rite_report, riemannian_adamw, stable_lora
from tests.golden.condense import probe

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
# float32: the traces themselves move by 1e-6 (LoRA-RITE 4e-6) when their gradients are perturbed by one unit in the
# last place. LoRA-RITE's first steps divide by a B of the size of the learning rate, which magnifies rounding.
TOLERANCE = {"f32": 2e-5, "f64": 1e-12}
TOLERANCE_RITE = {"f32": 5e-5, "f64": 1e-10}


def adamw(lr, hyper):
    b1, b2 = hyper["betas"]
    return optax.adamw(lr, b1, b2, eps=hyper["eps"], weight_decay=hyper["weight_decay"])


def riemannian(lr, hyper, ordering, reg):
    b1, b2 = hyper["betas"]
    return riemannian_adamw(
        lr,
        ordering=ordering,
        reg=reg,
        b1=b1,
        b2=b2,
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        bias_correction=hyper.get("correct_bias", True),
    )


def plus(lr, hyper):
    b1, b2 = hyper["betas"]
    decay = hyper["loraplus_weight_decay"]
    return lora_plus(lr, hyper["loraplus_lr_ratio"], b1=b1, b2=b2, eps=hyper["eps"], weight_decay=decay)


def rite(lr, hyper):
    b1, b2 = hyper["betas"]
    options = {"escape": hyper.get("apply_escape", False), "weight_decay": hyper.get("weight_decay", 0.0)}
    return lora_rite(lr, b1=b1, b2=b2, **options)


METHODS = {
    "adamw": adamw,
    "stable_lora": lambda lr, hyper: stable_lora(adamw(lr, hyper), hyper["shrink_ratio"]),
    "loraplus": plus,
    # The authors form reg · I in float32, also in their float64 runs.
    "riemann": lambda lr, hyper: riemannian(lr, hyper, "sequential", float(np.float32(hyper["reg"]))),
    "riemann_peft": lambda lr, hyper: riemannian(lr, hyper, "simultaneous", hyper["reg"]),
    "rite": rite,
}


def optimizer(case):
    schedule = case["lr_schedule"]
    lr = case["hyperparameters"]["lr"] if schedule is None else lambda step: jnp.asarray(schedule)[step]
    return METHODS[case["method"]](lr, case["hyperparameters"])


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
    """Returns the parameters after every step, and what the method decided in it: flags, or skips and clip factors."""
    tx = optimizer(case)
    width = {"f32": jnp.float32, "f64": jnp.float64}[dtype]
    pairs = range(len(case["pairs"]))
    names = [f"layers.{pair}" for pair in pairs]
    params = {
        names[i]: {"lora_A": jnp.asarray(trace[f"A0.{i}"], width), "lora_B": jnp.asarray(trace[f"B0.{i}"], width)}
        for i in pairs
    }
    state, step_fn = tx.init(params), jax.jit(tx.update)
    history, decided = [], []
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
            decided.append([not bool(state[0].stable[f"{name}/lora"]) for name in names])
        if case["method"] == "rite":
            report = lora_rite_report(params, state)
            skipped = [[int(side[f"{name}/lora"][0]) for side in report[1:]] for name in names]
            decided.append((np.array(skipped), float(report.clip_factor)))
    return names, history, decided


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in c["dtypes"]],
    ids=lambda v: v if isinstance(v, str) else v["name"],
)
def test_equals_the_authors_trace(case, dtype):
    trace = np.load(GOLDEN / f"{case['name']}.npz")
    with jax.enable_x64(dtype == "f64"):
        names, history, decided = replay(case, trace, dtype)
    tolerance = TOLERANCE[dtype]
    if case["method"] == "stable_lora":
        np.testing.assert_array_equal(decided, trace[f"{dtype}.keep"])
    if case["method"] == "rite":
        tolerance = TOLERANCE_RITE[dtype]
        counts, clip_factors = zip(*decided, strict=True)
        np.testing.assert_array_equal(counts, np.cumsum(trace[f"{dtype}.skipped"], axis=0))
        np.testing.assert_allclose(clip_factors, 1 / np.maximum(1, trace[f"{dtype}.g_norm"]), rtol=1e-4)
    for pair, name in enumerate(names):
        for side in "AB":
            ours = np.stack([params[name][f"lora_{side}"] for params in history])
            last = trace[f"{dtype}.{side}.{pair}.last"]
            assert np.linalg.norm(ours[-1] - last) <= tolerance * np.linalg.norm(last)
            # The root mean square of 8 probes is within a factor 3 of the Frobenius norm.
            off = np.sqrt(np.mean((probe(ours) - trace[f"{dtype}.{side}.{pair}.probes"]) ** 2, axis=1))
            norms = np.linalg.norm(ours.astype(np.float64), axis=(1, 2))
            assert np.all(off <= tolerance * norms), (side, int(np.argmax(off / norms)), np.max(off / norms))
