"""The three terms of what one step adds to an adapter's product, measured without any data.

``(A + ΔA)(B + ΔB) - A B = A ΔB + ΔA B + ΔA ΔB``. The theory (arXiv 2603.05204, section 3) follows δ₁, δ₂ and δ₃, which
are s Z times these for layer inputs Z. Their Frobenius norms here are what white inputs would give, up to the factor s.
ΔA is all that A moves, shrink and weight decay included.

No n x m matrix is formed: ‖X Y‖_F² = Σ (XᵀX) ∘ (Y Yᵀ), a sum over r x r entries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stable_lora_jax.optim.linalg import factors, gram
from stable_lora_jax.optim.pairs import Labels, PyTree, StackAxes, find_pairs, is_none


class UpdateTerms(NamedTuple):
    """‖A ΔB‖, ‖ΔA B‖ and ‖ΔA ΔB‖ of a pair, one element per matrix of a stack."""

    delta_1: Float[Array, "*stack"]
    delta_2: Float[Array, "*stack"]
    delta_3: Float[Array, "*stack"]


def update_terms(
    before: PyTree, after: PyTree, *, labels: Labels = None, stack_axes: StackAxes = "infer"
) -> dict[str, UpdateTerms]:
    """Returns pair name -> `UpdateTerms` of the step between two states of the parameters. Jittable.

    Pairs whose rank axis is unknown are left out (see `layouts`); matrices A that share a B count as one.

    Args:
      before: the parameters before the step.
      after: the same tree after it.
      labels, stack_axes: which leaves are A and B; see `find_pairs`.

    Examples:
      >>> before = {"lora_a": 2 * jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 9))}
      >>> after = {"lora_a": 3 * jnp.ones((4, 1)), "lora_b": jnp.ones((1, 9))}
      >>> print(*(f"{term:.1f}" for term in update_terms(before, after)["lora"]))
      12.0 0.0 6.0
    """
    old, new = (jax.tree.leaves(tree, is_leaf=is_none) for tree in (before, after))
    terms = {}
    for pair in find_pairs(before, labels, stack_axes):
        if pair.rank_axes is None:
            continue
        (a,), (b,) = factors([[pair]], old)
        (new_a,), (new_b,) = factors([[pair]], new)
        stack = [old[pair.a].shape[axis] for axis in pair.stack_axes_b]

        terms[pair.name] = UpdateTerms(
            *(
                jnp.sqrt(jnp.maximum(square.sum() if pair.groups > 1 else square.reshape(stack), 0))
                for square in (
                    _squared_norm(a, new_b - b),
                    _squared_norm(new_a - a, b),
                    _squared_norm(new_a - a, new_b - b),
                )
            )
        )
    return terms


def _squared_norm(x: Float[Array, "k r n"], y: Float[Array, "k r m"]) -> Float[Array, "k"]:
    """Returns ‖X Yᵀ‖² of every matrix."""
    return jnp.sum(gram(x, x) * gram(y, y), axis=(-2, -1))
