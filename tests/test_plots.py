"""What the figures show: each line's values, the dots where a layer stopped, the running mean."""

import json

import numpy as np

from stable_lora_jax.plots import plot_losses, plot_norms

STEPS = (0, 4, 8)
# Two layers of one module. B is 0 at step 0, so the gap has no value there.
NORMS = {"norm_a": [[4.0, 3.0], [3.0, 2.0], [2.0, 1.0]], "norm_b": [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]}
GAP = [[None, None], [3.0, 1.0], [1.0, 0.25]]


def run(directory):
    """Writes metrics of eight steps, in which the second layer stops at step 2 and the first at step 8."""
    lines = [{"step": step, "loss": 10.0 - step} for step in range(1, 9)]
    lines += [{"step": step, "pair": "layers/q_proj/lora", "index": [layer]} for step, layer in ((2, 1), (8, 0))]
    for i, step in enumerate(STEPS):
        values = {name: rows[i] for name, rows in NORMS.items()} | {"gap": GAP[i]}
        lines.append({"step": step, "norms": {"layers/q_proj/lora": values}})
    lines.sort(key=lambda line: line["step"])
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_norms_have_a_line_a_layer_and_a_dot_where_it_stopped(tmp_path):
    for ax, rows in zip(plot_norms(run(tmp_path)).axes, [*NORMS.values(), GAP], strict=True):
        drawn = [line for line in ax.lines if line.get_marker() != "o" and len(line.get_xdata()) != 2]  # but gap = 1
        dots = {line.get_xdata()[0]: line.get_ydata()[0] for line in ax.lines if line.get_marker() == "o"}
        values = np.array(rows, float)
        for line, layer in zip(drawn, values.T, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), STEPS)
            np.testing.assert_array_equal(line.get_ydata(), layer)
        # Between two records a dot lies on the line; before the first gap there is, at its height.
        between = values[1, 1] if rows is GAP else (values[0, 1] + values[1, 1]) / 2
        assert dots == {2: between, 8: values[2, 0]}


def test_losses_have_a_running_mean(tmp_path):
    every, mean = plot_losses({"mine": run(tmp_path)}).axes[0].lines
    np.testing.assert_array_equal(every.get_ydata(), [9, 8, 7, 6, 5, 4, 3, 2])
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([8], [5.5])  # of all eight: fewer than 20
    assert mean.get_label() == "mine"
