"""The norms of each pair, what a Stable-LoRA state says of it, and how to open its flags again."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stable_lora_jax.optim.pairs import (
    Labels,
    Pair,
    PyTree,
    StackAxes,
    find_pairs,
    find_pairs_of_state,
    find_states,
    is_none,
    unwrap_variables,
)
from stable_lora_jax.optim.stable_lora import StableLoraState, norms_of_pair


class PairStability(NamedTuple):
    """How far a pair is, one element per matrix of a stack: norms ‖A‖_F and ‖B‖_F, gap = (‖A‖/n)/(‖B‖/m), the flag.

    Norms and gap are those of the current values. `stable` was evaluated at the start of the last step, so it turns
    True one step after the gap drops below 1, and stays True if the gap rises again.
    """

    norm_a: Float[Array, "*stack"]
    norm_b: Float[Array, "*stack"]
    gap: Float[Array, "*stack"]
    stable: Bool[Array, "*stack"]


class PairNorms(NamedTuple):
    """‖A‖_F, ‖B‖_F and gap = (‖A‖/n)/(‖B‖/m) of a pair, one element per matrix of a stack."""

    norm_a: Float[Array, "*stack"]
    norm_b: Float[Array, "*stack"]
    gap: Float[Array, "*stack"]


def pair_norms(params: PyTree, *, labels: Labels = None, stack_axes: StackAxes = "infer") -> dict[str, PairNorms]:
    """Returns pair name -> `PairNorms`, for any optimizer. Jittable. The gap is infinite where B = 0, 0 where A = 0.

    Args:
      params: the parameters.
      labels, stack_axes: which leaves are A and B, and which axes count matrices; see `find_pairs`.

    Examples:
      >>> norms = pair_norms({"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 9))})["lora"]
      >>> print(*(f"{each:.1f}" for each in norms))  # (2/4) / (3/9)
      2.0 3.0 1.5
    """
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    pairs = find_pairs(params, labels, stack_axes)
    return {pair.name: _norms(leaves, pair, None) for pair in pairs}


def _norms(leaves: Sequence[Any], pair: Pair, pending: Array | None) -> PairNorms:
    norm_a, norm_b = norms_of_pair(leaves[pair.a], leaves[pair.b], pair, pending)
    return PairNorms(norm_a, norm_b, jnp.where(norm_a == 0, 0, norm_a / (norm_b * pair.fan_ratio)))


def stability(
    params: PyTree, opt_state: PyTree, *, labels: Labels = None, stack_axes: StackAxes = "infer"
) -> dict[str, PairStability]:
    """Returns pair name -> `PairStability`, from the parameters and whatever optimizer state holds Stable-LoRA's.

    Jittable. Looks inside `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams` and the `opt_state`
    of a `flax.nnx.Optimizer`. The gap is infinite while B = 0, and 0 where A = 0. A report stays valid when the state
    that it is of is donated.

    Args:
      params: the parameters; pairs of other transformations, as next to those of a partition, are left out.
      opt_state: the optimizer state.
      labels: as given to the transformation.
      stack_axes: as given to the transformation; needed only where two axes of one size could be the stack, as else the
        flags' shapes tell.

    Raises:
      ValueError: no `StableLoraState` inside `opt_state`, or two that hold the same pair, or one that holds pairs which
        `params` lacks.
    """
    states = find_states(opt_state, StableLoraState)
    if not states:
        raise ValueError(
            f"opt_state, a {type(opt_state).__name__}, holds no StableLoraState. Pass the state of a transformation "
            "built with stable_lora_shrink or stable_lora; for a flax.nnx.Optimizer pass optimizer.opt_state."
        )
    stable = [name for state in states for name in state.stable]
    if len(stable) != len(set(stable)):
        raise ValueError(
            "opt_state holds several StableLoraState with the same pair, so A would shrink twice. Apply Stable-LoRA to "
            "each pair once."
        )
    flags = {name: flag for state in states for name, flag in unwrap_variables(state.stable).items()}
    pending = {name: factor for state in states for name, factor in unwrap_variables(state.pending).items()}
    stacks = {name: jnp.shape(flag) for name, flag in flags.items()}
    leaves, pairs = jax.tree.leaves(params, is_leaf=is_none), find_pairs_of_state(params, labels, stack_axes, stacks)
    if missing := flags.keys() - (held := {pair.name for pair in pairs}):
        raise ValueError(
            f"opt_state belongs to other parameters: it has flags of the pairs {sorted(missing)}, params hold "
            f"{sorted(held)}. Pass the tree that the transformation was initialized with, at the same level."
        )
    report = {}
    for pair in pairs:
        if pair.name in flags:
            norms = _norms(leaves, pair, pending.get(pair.name))
            # A copy: a step that the state is donated to deletes the state's own.
            report[pair.name] = PairStability(*norms, jnp.copy(flags[pair.name]))
    return report


def reset_stability(opt_state: PyTree, names: Callable[[str], bool] | None = None) -> PyTree:
    """Returns the optimizer state with the flags of some pairs open again, so that their A shrinks anew.

    For adapters that are merged and started anew during a run, as in ReLoRA: re-initialize A and B, and pass the state
    through this. Shrinks still pending belong to the old A and are dropped. Jittable.

    Args:
      opt_state: any optimizer state that contains Stable-LoRA's, however chained or wrapped.
      names: which pairs, from the name; None resets all.

    Raises:
      ValueError: no `StableLoraState` inside `opt_state`, or no pair that `names` accepts.

    Examples:
      >>> from stable_lora_jax import stable_lora_shrink
      >>> params = {"lora_a": jnp.ones((64, 8)), "lora_b": 2 * jnp.ones((8, 64))}
      >>> tx = stable_lora_shrink(0.001)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> bool(state.stable["lora"]), bool(reset_stability(state).stable["lora"])
      (True, False)
    """
    states = find_states(opt_state, StableLoraState)
    held = [name for state in states for name in state.stable]
    if not states or not any(names is None or names(name) for name in held):
        raise ValueError(f"opt_state holds no flag to reset: its pairs are {held}. names must accept one of them.")

    def reset(state: StableLoraState) -> StableLoraState:
        def renew(flags: dict[str, Any], fresh: Callable[[Array], Array]) -> dict[str, Any]:
            return {n: jax.tree.map(fresh, x) if names is None or names(n) else x for n, x in flags.items()}

        return StableLoraState(state.count, renew(state.stable, jnp.zeros_like), renew(state.pending, jnp.ones_like))

    def is_state(node: object) -> bool:
        return isinstance(node, StableLoraState)

    return jax.tree.map(lambda node: reset(node) if is_state(node) else node, opt_state, is_leaf=is_state)
