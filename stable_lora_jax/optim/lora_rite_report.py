"""What LoRA-RITE kept from moving: the steps it skipped and how far it clipped."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float32, Int32

from stable_lora_jax.optim.linalg import by_pair, group_by_shape, num_matrices
from stable_lora_jax.optim.lora_rite import LoraRiteState
from stable_lora_jax.optim.pairs import Labels, PyTree, StackAxes, find_pairs, find_states, is_none


class LoraRiteReport(NamedTuple):
    """What kept the factors from moving: the last step's global clip factor, and each pair's number of skipped steps.

    Attributes:
      clip_factor: min(1, clip / global norm of all u) of the last step; 1 means not clipped.
      skipped_a: pair name -> steps so far in which A did not move, (k,) for the k matrices of a stack.
      skipped_b: the same for B.
    """

    clip_factor: Float32[Array, ""]
    skipped_a: dict[str, Int32[Array, "k"]]
    skipped_b: dict[str, Int32[Array, "k"]]


def lora_rite_report(
    params: PyTree, opt_state: PyTree, *, labels: Labels = None, stack_axes: StackAxes = "infer"
) -> LoraRiteReport:
    """Returns what LoRA-RITE kept from moving so far, wherever its state stands in an optimizer state. Jittable.

    Args:
      params: the parameters that LoRA-RITE was given; where it was given a part of them, as by `optax.masked`, that.
      opt_state: the optimizer state.
      labels, stack_axes: as given to the transformation.

    Raises:
      ValueError: no `LoraRiteState`, or several, inside `opt_state`; one that belongs to other parameters.
    """
    states = find_states(opt_state, LoraRiteState)
    if len(states) != 1:
        raise ValueError(
            f"opt_state, a {type(opt_state).__name__}, holds {len(states)} LoraRiteState instead of one. Pass the "
            "state of a transformation built with lora_rite; for a flax.nnx.Optimizer pass optimizer.opt_state."
        )
    (state,) = states
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    groups = group_by_shape(find_pairs(params, labels, stack_axes), leaves)
    skipped_a, skipped_b = ([jax.tree.leaves(each.skipped)[0] for each in side] for side in (state.a, state.b))
    held, counted = [num_matrices(group, leaves) for group in groups], [len(each) for each in skipped_a]
    if held != counted:
        raise ValueError(
            f"opt_state belongs to other parameters: it counts {counted} matrices of each kind, params hold {held}. "
            "Pass the parameters, labels and stack_axes that LoRA-RITE was given."
        )
    clip_factor = jax.tree.leaves(state.clip_factor)[0]
    return LoraRiteReport(clip_factor, by_pair(groups, skipped_a, leaves), by_pair(groups, skipped_b, leaves))
