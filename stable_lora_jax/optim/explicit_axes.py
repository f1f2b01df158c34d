"""Updates on meshes with Explicit axes, the default of `jax.make_mesh`, where an array's sharding is part of its type.

The optimizers stack the matrices of many pairs, and sum over axes that may be sharded: the types do not say where the
results should lie. Inside an update the axes are therefore Auto, so that the compiler decides, and what comes out is
laid out like what came in.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, NamedSharding

from stable_lora_jax.optim.pairs import PyTree

Update = Callable[..., tuple[PyTree, Any]]


def auto_inside(update: Update) -> Update:
    """Returns the `update` of a transformation, with Auto axes inside and the shardings of its arguments outside.

    New updates are laid out like the updates given, the new state like the state. Where no axis is Explicit, nothing
    changes. Eager calls on an Explicit mesh must be in its context, as JAX says (`jax.set_mesh`).
    """

    @functools.wraps(update)
    def wrapped(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: object) -> tuple[PyTree, Any]:
        mesh = _mesh((updates, state, params))
        if not mesh.explicit_axes:
            return update(updates, state, params, **extra_args)
        given = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), (updates, state))
        inside = functools.partial(update, **extra_args)
        on_auto_axes = cast(Update, jax.sharding.auto_axes(inside, axes=mesh.explicit_axes, out_sharding=given))
        return on_auto_axes(updates, state, params)

    return wrapped


def _mesh(tree: PyTree) -> AbstractMesh:
    """Returns the mesh of the context, or else that of the arrays; empty if there is neither."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    context = jax.sharding.get_abstract_mesh()
    return context if not context.empty else next((mesh for mesh in meshes if not mesh.empty), context)
