"""What the figures show: each line's values, the dots where a layer stopped, the running mean."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from stable_lora_jax import PairNorms, PairStability
from stable_lora_jax.plots import plot_stability
from stable_lora_jax.training.figures import plot_losses, plot_norms

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


def reports(stacked, steps=(0, 10, 20, 30)):
    """Returns reports in which the gap of layer i falls below 1 after step 10 i + 10."""
    norm_a, norm_b = (lambda step: np.array([4.0 - step / 20, 3.0])), (lambda step: np.array([step, step / 2]) / 10)
    found = {}
    for step in steps:
        a, b = norm_a(step), norm_b(step)
        with np.errstate(divide="ignore"):
            values = a, b, a / b, np.array([step >= 20, step >= 30])
        values = [jnp.asarray(value) for value in values]
        names = ["layers/q/lora"] if stacked else ["layers/0/q/lora", "layers/1/q/lora"]
        found[step] = {
            name: PairStability(*(value if stacked else value[i] for value in values)) for i, name in enumerate(names)
        }
    return found


@pytest.mark.parametrize("stacked", [True, False])
def test_reports_of_any_loop(stacked):
    history = reports(stacked)
    figure = plot_stability(history, title="mine")
    assert len(figure.axes) == 3  # layers share a column, stacked or not
    assert [ax.get_title() for ax in figure.axes] == ["q", "", ""]
    assert figure.get_suptitle() == "mine\none line per layer (dark: first), dots: the layer's shrink stopped"
    first, second = [line for line in figure.axes[0].lines if line.get_marker() != "o"]
    np.testing.assert_allclose(first.get_ydata(), [4.0, 3.5, 3.0, 2.5])
    np.testing.assert_allclose(second.get_ydata(), [3.0] * 4)
    dots = [(*line.get_xdata(), *line.get_ydata()) for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert dots == [(20, 3.0), (30, 3.0)]
    gap = figure.axes[2].lines[0].get_ydata()
    np.testing.assert_allclose(gap, [np.nan, 3.5, 1.5, 2.5 / 3], rtol=1e-6)  # no gap where B = 0
    figure.savefig(io.BytesIO())


def test_reports_without_flags_have_no_dots():
    history = {
        step: {name: PairNorms(*pair[:3]) for name, pair in report.items()} for step, report in reports(True).items()
    }
    figure = plot_stability(history)
    assert not [line for ax in figure.axes for line in ax.lines if line.get_marker() == "o"]
    assert figure.get_suptitle() == "one line per layer (dark: first)"


def test_reports_of_nothing_and_of_two_models():
    with pytest.raises(ValueError, match="history holds no report"):
        plot_stability({})
    with pytest.raises(ValueError, match=r"The reports of steps 0 and 10 differ in the pairs \['layers/0/q/lora'"):
        plot_stability({0: reports(False)[0], 10: reports(True)[10]})


def test_losses_have_a_running_mean(tmp_path):
    every, mean = plot_losses({"mine": run(tmp_path)}).axes[0].lines
    np.testing.assert_array_equal(every.get_ydata(), [9, 8, 7, 6, 5, 4, 3, 2])
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([8], [5.5])  # of all eight: fewer than 20
    assert mean.get_label() == "mine"
