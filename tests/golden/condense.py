"""Condenses the authors' traces to what the tests need: ``python tests/golden/condense.py TRACES NAME [NAME …]``.

TRACES is a folder of full traces (manifest.json and .npz files recorded from the reference implementations). Kept:
  * the start (A0, B0) and, so that float64 runs recompute their gradients, the problem (W0, X, Y);
  * the gradients of every step of float32 runs;
  * the flags of every step;
  * of A and B, for every step, `PROBES` inner products with random signs, and the whole matrices after the last step.
The root mean square of the probes of a difference estimates its Frobenius norm, so a single wrong step is seen at that
step without storing every matrix.
"""

import argparse
import json
from pathlib import Path

import numpy as np

PROBES = 8
HERE = Path(__file__).parent
FIELDS = ("name", "method", "steps", "pairs", "dtypes", "s", "problem", "hyperparameters", "lr_schedule")
PER_STEP = ("keep", "skipped", "g_norm")


def signs(shape: tuple[int, ...]) -> np.ndarray:
    """Returns (PROBES, *shape) random signs, the same for every matrix of a shape."""
    return np.random.default_rng(20260305).choice([-1.0, 1.0], size=(PROBES, *shape))


def probe(matrices: np.ndarray) -> np.ndarray:
    """Returns the inner products of (steps, rows, columns) matrices with the signs, shape (steps, PROBES)."""
    return np.einsum("trc,prc->tp", matrices.astype(np.float64), signs(matrices.shape[1:]))


def condense(trace: dict[str, np.ndarray], case: dict) -> dict[str, np.ndarray]:
    """Returns the arrays to keep of one trace."""
    kept = {}
    for pair in range(len(case["pairs"])):
        problem = ("W0", "X", "Y") if "f64" in case["dtypes"] else ()
        kept |= {f"{array}.{pair}": trace[f"{array}.{pair}"] for array in ("A0", "B0", *problem)}
        for dtype in case["dtypes"]:
            for side in "AB":
                steps = trace[f"{dtype}.{side}.{pair}"]
                kept[f"{dtype}.{side}.{pair}.probes"] = probe(steps)
                kept[f"{dtype}.{side}.{pair}.last"] = steps[-1]
                if dtype == "f32":
                    kept[f"{dtype}.g{side}.{pair}"] = trace[f"{dtype}.g{side}.{pair}"]
    for dtype in case["dtypes"]:
        kept |= {name: trace[name] for key in PER_STEP if (name := f"{dtype}.{key}") in trace}
    return kept


def main() -> None:
    """Writes NAME.npz and cases.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    cases = {case["name"]: case for case in json.loads((args.traces / "manifest.json").read_text())["cases"]}
    for name in args.names:
        np.savez_compressed(HERE / f"{name}.npz", **condense(np.load(args.traces / f"{name}.npz"), cases[name]))
    listed = [{field: cases[name][field] for field in FIELDS} for name in args.names]
    (HERE / "cases.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main()
