"""Cells as tasks of Ray: every group of cells is one task, and its lines come back to the process that writes them.

Ray says where a task runs, and starts it again where its machine was lost; the run then goes on from its newest
checkpoint. All machines need the repository, its environment, models, data and the folder of the runs under the same
paths, as in a shared file system.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


def run_on_ray(
    groups: Sequence[Sequence[Any]], run_group: Callable[[Sequence[Any]], Iterable[dict[str, Any]]], cores: int
) -> Iterator[dict[str, Any]]:
    """Yields the lines of all groups, those of a group together, in the order in which they end.

    The cluster is the one that this process is connected to, else that of RAY_ADDRESS, else one of this machine alone.

    Args:
      groups: cells to train at once, a task each.
      run_group: trains and scores a group, and yields its lines; paths in it must be absolute.
      cores: CPU cores that a task takes; it takes one GPU too, where the cluster has any.

    Raises:
      ModuleNotFoundError: Ray is not installed; says which extra to install.
      ray.exceptions.RayError: tasks failed; raised for the first of them once the others have ended.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--ray needs Ray. Run: pip install 'stable-lora-jax[ray]', or leave --ray out."
        ) from error
    if not ray.is_initialized():
        ray.init()
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    def lines_of(group: Sequence[Any]) -> list[dict[str, Any]]:
        return list(run_group(group))

    task = ray.remote(num_cpus=cores, num_gpus=gpus)(lines_of)
    waiting, errors = [task.remote(group) for group in groups], []
    while waiting:
        (ended,), waiting = ray.wait(waiting)
        try:
            lines = ray.get(ended)
        except RayError as error:
            errors.append(error)
        else:
            yield from lines
    if errors:
        print(f"{len(errors)} of {len(groups)} tasks failed, the first with:", file=sys.stderr)
        raise errors[0]
