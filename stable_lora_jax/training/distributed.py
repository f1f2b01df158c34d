"""Several processes, one run.

Every process runs the same program on the same values. Each builds only its own rows of a batch and holds only its own
part of the weights; process 0 alone prints and writes metrics; checkpoints are written by all. What one process learns
by itself (a signal) is told to the others before anyone acts on it, so that all leave the loop after the same step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class LostProcessError(RuntimeError):
    """What this process shared with the others failed, most likely because one of them has ended."""


def join_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 100,
) -> None:
    """Makes this process one of several; to be called before anything runs on a device.

    Without arguments, JAX reads them from what Cloud TPU, SLURM, Open MPI or Kubernetes set.

    Args:
      coordinator: host:port of process 0, the same in every process.
      processes: how many there are, >= 1.
      process_id: which one this is, in [0, processes).
      heartbeat_timeout: seconds of silence, >= 1, after which a process counts as lost and all others end; also how
        long one that has come to its end waits for the others.

    Raises:
      ValueError: only some of the three given, one out of range, or none given where nothing is set.
      RuntimeError: the processes did not find each other.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    if None in given.values():
        if any(value is not None for value in given.values()):
            raise ValueError(
                f"{told}: only some are given. Give all three, or none of them where Cloud TPU, SLURM, Open MPI or "
                "Kubernetes sets them."
            )
    elif ":" not in str(coordinator) or not 0 <= int(process_id or 0) < int(processes or 0):
        raise ValueError(
            f"{told}: allowed are a host:port, at least one process, and a process_id in [0, processes). Give every "
            "process the same first two and a number of its own."
        )
    if heartbeat_timeout < 1:
        raise ValueError(f"heartbeat_timeout={heartbeat_timeout} is below 1 second. Leave it out for 100.")
    # JAX's own SIGTERM handler would take the signal that the training loop saves and stops at.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        if coordinator:
            raise ValueError(f"{told}: JAX refuses them ({error})") from error
        raise ValueError(
            f"No Cloud TPU, SLURM, Open MPI or Kubernetes job is found here ({error}) Start the processes by one of "
            "them, or give coordinator, processes and process_id."
        ) from error


def is_first() -> bool:
    """Returns whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(reason: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        with shared_work():
            multihost_utils.sync_global_devices(reason)


@contextmanager
def shared_work() -> Iterator[None]:
    """Turns an error of the runtime inside the block, where several processes share the work, into LostProcessError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).partition("\n")[0]
        raise LostProcessError(
            f"Process {jax.process_index()} of {jax.process_count()} cannot continue: {reason} Most likely another "
            "process has ended; its own output says why. Start all of them again and resume from the newest checkpoint "
            "(--resume)."
        ) from error


def local_rows(sharding: NamedSharding, rows: int) -> tuple[int, ...]:
    """Returns which of a batch's rows this process needs, in rising order."""
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for part in parts if part for row in range(rows)[part[0]]}))


def rows_to_mesh(tree: Any, sharding: NamedSharding, rows: int) -> Any:
    """Returns arrays of so many rows in all, each process giving those that `local_rows` names."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)  # all leaves at once

    def join(own: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, own, (rows, *own.shape[1:]))

    return jax.tree.map(join, tree)


def to_mesh(tree: Any, shardings: Any) -> Any:
    """Returns a tree on the mesh, of which every process holds what its devices get; nothing goes between processes.

    Args:
      tree: arrays; the same in every process.
      shardings: one for all, or a tree of them.
    """
    if jax.process_count() == 1:
        # Committed to where they are, which copies nothing: else JAX would cut them up on the first device.
        tree = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), tree)
        return jax.device_put(tree, shardings)

    def place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
        if not leaf.is_fully_addressable:  # on the mesh already, where it was read to
            return leaf if leaf.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def max_across_processes(mesh: Mesh) -> Callable[[int], int]:
    """Returns a function of a number that returns the highest given by any process: all get the same answer.

    It must be called by all, equally often. Among several processes the answer is that of the call before, so that
    nobody waits for it; 0 at first.
    """
    if jax.process_count() == 1:
        return lambda number: number
    everywhere = NamedSharding(mesh, PartitionSpec())
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    highest = jax.jit(jnp.max, out_shardings=everywhere)
    own = len(each.addressable_devices)
    waiting: list[jax.Array] = []

    def call(number: int) -> int:
        waiting.append(highest(rows_to_mesh(np.full(own, number, np.int32), each, mesh.size)))
        return int(waiting.pop(0)) if len(waiting) > 1 else 0

    return call
