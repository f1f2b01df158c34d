"""LoRA+ (arXiv 2402.12354): AdamW in which B learns `ratio` times as fast as A.

With one learning rate for both, the feature updates that come from A vanish with the width; η_B/η_A of the order of
the width keeps both alive. In practice one constant serves: the paper advises about 16, the Stable-LoRA paper compares
with 4.

As in PEFT's implementation the decay of a factor uses that factor's learning rate, so B decays `ratio` times as fast.

Moments are Optax's, in the parameters' dtype: with bfloat16 adapters b2 = 0.999 rounds to 1, and the second moment only
grows, as it does in `optax.adamw`. Keep adapters in float32, as our own injection does.
"""

import math
from typing import Any

import jax
import optax

from stable_lora_jax.optim.hyperparameters import Number, check_adam, check_range
from stable_lora_jax.optim.pairs import Labels, PyTree, StackAxes, find_pairs, is_none


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: Number,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    labels: Labels = None,
    stack_axes: StackAxes = "infer",
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with learning rate η for A (and all that is no adapter), and ratio · η for B.

    Args:
      learning_rate: η, a number or a schedule; the ratio holds at every step of it.
      ratio: η_B/η_A, >= 0. LoRA+ is a ratio above 1; one below slows B down.
      b1, b2, eps: as in `optax.adamw`.
      weight_decay: decoupled, scaled by each factor's own learning rate.
      labels, stack_axes: which leaves are A and B; see `find_pairs`.

    Raises:
      ValueError: a number out of range; in init, everything that `find_pairs` raises.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((64, 8)), "lora_b": jnp.zeros((8, 64))}
      >>> tx = lora_plus(1e-3, ratio=16)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> print(f"{updates['lora_a'][0, 0]:.3f} {updates['lora_b'][0, 0]:.3f}")
      -0.001 -0.016

    References:
      Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv 2402.12354, section 4.
    """
    check_range(
        "ratio", ratio, 0, math.inf, "It is the learning rate of B over that of A; LoRA+ advises about 16, 1 is AdamW."
    )
    check_adam(b1, b2, eps, weight_decay)

    def init(params: PyTree) -> optax.EmptyState:
        find_pairs(params, labels, stack_axes)
        return optax.EmptyState()

    def faster_b(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, optax.EmptyState]:
        moves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        for pair in find_pairs(params, labels, stack_axes):  # `optax.adamw` has refused params=None
            moves[pair.b] = (ratio * moves[pair.b]).astype(moves[pair.b].dtype)
        return jax.tree.unflatten(treedef, moves), state

    return optax.chain(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
        optax.GradientTransformation(init, faster_b),
    )
