"""One figure of what the shrink does, for any training loop: ‖A‖, ‖B‖ and gap of every matrix over the steps.

It needs matplotlib (the extra `plots`) next to the core, and the reports that `stability` or `pair_norms` returned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stable_lora_jax.extras import needs
from stable_lora_jax.optim import PairNorms, PairStability

with needs("plots"):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

__all__ = ["plot_stability"]

_ROWS = {"norm_a": "‖A‖", "norm_b": "‖B‖", "gap": "gap = (‖A‖/n) / (‖B‖/m)"}


def plot_stability(
    history: Mapping[int, Mapping[str, PairStability] | Mapping[str, PairNorms]], *, title: str = ""
) -> Figure:
    """Returns ‖A‖, ‖B‖ and gap over the steps: a column per module, a line per layer, a dot where its shrink stopped.

    Pairs whose names differ in numbers alone, as of layers that are not stacked, share a column. The dot is at the
    first step of the history whose report says so; `pair_norms`, for other optimizers, says nothing of it.

    Args:
      history: step -> report of `stability` or of `pair_norms`; some steps are enough, every tenth, say.
      title: above the figure.

    Raises:
      ValueError: no report, or reports of different pairs.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stable_lora_jax import stability, stable_lora_shrink
      >>> params = {"lora_a": jnp.ones((64, 8)), "lora_b": jnp.zeros((8, 64))}
      >>> tx = optax.chain(optax.adam(0.01), stable_lora_shrink(0.1))
      >>> state, history = tx.init(params), {}
      >>> for step in range(40):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     history[step] = stability(params, state)
      >>> plot_stability(history, title="a pair")
      <Figure size 500x800 with 3 Axes>
    """
    steps = sorted(history)
    if not steps:
        raise ValueError("history holds no report. Add history[step] = stability(params, state) to the training loop.")
    names = list(history[steps[0]])
    for step in steps:
        if set(history[step]) != set(names):
            differing = sorted(set(history[step]) ^ set(names))
            raise ValueError(
                f"The reports of steps {steps[0]} and {step} differ in the pairs {differing}. Draw one model at a time."
            )
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault("/".join(part for part in name.split("/") if not part.isdigit()), []).append(name)

    def of_module(pairs: Sequence[str], field: str) -> np.ndarray:
        """Returns the numbers of a module, (steps, layers)."""
        return np.array(
            [np.concatenate([np.ravel(np.asarray(getattr(history[s][pair], field))) for pair in pairs]) for s in steps],
            float,
        )

    values = {module: {field: of_module(pairs, field) for field in _ROWS} for module, pairs in modules.items()}
    stops: dict[str, dict[int, int]] = {}
    for module, pairs in modules.items():
        if all(isinstance(history[step][pair], PairStability) for step in steps for pair in pairs):
            stable = of_module(pairs, "stable") > 0
            stops[module] = {int(layer): steps[stable[:, layer].argmax()] for layer in np.flatnonzero(stable.any(0))}
    return draw_norms(steps, values, stops, title)


def draw_norms(
    steps: Sequence[int],
    values: Mapping[str, Mapping[str, np.ndarray]],
    stops: Mapping[str, Mapping[int, int]],
    title: str = "",
) -> Figure:
    """Returns the figure of `plot_stability`.

    Args:
      steps: in rising order.
      values: module -> norm_a, norm_b and gap, each (steps, layers); what is not finite, as a gap where B = 0, is left
        out.
      stops: module -> layer -> the step at which its shrink stopped.
      title: above the figure.
    """
    figure = Figure(figsize=(4.2 * len(values) + 0.8, 8), layout="constrained")
    axes = figure.subplots(len(_ROWS), len(values), sharex=True, sharey="row", squeeze=False)
    for column, (module, fields) in enumerate(values.items()):
        for row, (field, label) in enumerate(_ROWS.items()):
            ax = axes[row, column]
            _draw_layers(ax, steps, fields[field], stops.get(module, {}))
            if field == "gap":
                ax.set(yscale="log", xlabel="step")
                ax.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            if column == 0:
                ax.set_ylabel(label)
        axes[0, column].set_title(_title(module))
    dots = ", dots: the layer's shrink stopped" if any(stops.values()) else ""
    above = f"{title}\n" if title else ""
    figure.suptitle(f"{above}one line per layer (dark: first){dots}", fontsize="medium")
    return figure


def _draw_layers(ax: Any, steps: Sequence[int], values: np.ndarray, stops: Mapping[int, int]) -> None:
    colors = colormaps["viridis"](np.linspace(0, 0.9, values.shape[1]))
    for layer, color in enumerate(colors):
        known = np.isfinite(values[:, layer])
        line = np.where(known, values[:, layer], np.nan)
        ax.plot(steps, line, color=color, linewidth=0.9)
        if layer in stops and known.any():
            height = np.interp(stops[layer], np.array(steps)[known], line[known])
            ax.plot([stops[layer]], [height], marker="o", markersize=3.5, color=color, zorder=3)


def _title(module: str) -> str:
    parts = [part for part in module.split("/") if part not in ("layers", "lora")]
    return ".".join(parts) or module
