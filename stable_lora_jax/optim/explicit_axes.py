"""Computations on meshes with Explicit axes, the default of `jax.make_mesh`, where a sharding is part of a type.

The optimizers stack the matrices of many pairs, and sum over axes that may be sharded: the types do not say where the
results should lie. Inside these computations the axes are therefore Auto, so that the compiler decides, and what comes
out is laid out like what came in.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from stable_lora_jax.optim.pairs import PyTree

Update = Callable[..., tuple[PyTree, Any]]


def auto_inside(**numbers: Any) -> Callable[[Update], Update]:
    """Returns a decorator that runs the `update` of a transformation with Auto axes.

    New updates are laid out like the updates given, the new state like the state. Where no axis is Explicit, nothing
    changes.

    Args:
      numbers: hyper-parameters that `update` takes as keywords. An array or a tracer among them, as
        `optax.inject_hyperparams` brings, must not be closed over: its type names the Explicit axes.
    """

    def decorate(update: Update) -> Update:
        @functools.wraps(update)
        def wrapped(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: object
        ) -> tuple[PyTree, Any]:
            def inside(updates: PyTree, state: Any, params: PyTree, keywords: dict[str, Any]) -> tuple[PyTree, Any]:
                return update(updates, state, params, **keywords)

            return on_auto_axes(inside, (updates, state), updates, state, params, numbers | extra_args)

        return wrapped

    return decorate


def on_auto_axes(function: Callable[..., Any], like: PyTree, *args: PyTree) -> Any:
    """Returns ``function(*args)``, computed with Auto axes and laid out like the tree `like` of arrays.

    Leaves of `args` that are no arrays, as a module's functions and strings, do not pass through JAX.
    """
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    mesh = _mesh(arrays)
    if not mesh.explicit_axes:
        return function(*args)

    def inside(arrays: dict[int, jax.Array]) -> Any:
        return function(*jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))

    with _context(mesh, arrays):
        layout = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), like)
        mapped = jax.sharding.auto_axes(inside, axes=mesh.explicit_axes, out_sharding=layout)
        return cast(Callable[..., Any], mapped)(arrays)


def _mesh(arrays: dict[int, Any]) -> AbstractMesh:
    """Returns the mesh of the context, or else that of the arrays; empty if there is neither."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in arrays.values())
    context = jax.sharding.get_abstract_mesh()
    return context if not context.empty else next((mesh for mesh in meshes if not mesh.empty), context)


def _context(mesh: AbstractMesh, arrays: dict[int, Any]) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which `mesh` is set, for callers that have not set it."""
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    of_arrays = (getattr(leaf, "sharding", None) for leaf in arrays.values() if not isinstance(leaf, Tracer))
    concrete = [each.mesh for each in of_arrays if isinstance(each, NamedSharding) and isinstance(each.mesh, Mesh)]
    try:
        return jax.set_mesh(concrete[0]) if concrete else jax.sharding.use_abstract_mesh(mesh)
    except ValueError:  # something is being traced, as the branches of `jax.lax.cond`, which close over these arrays
        return jax.sharding.use_abstract_mesh(mesh)
