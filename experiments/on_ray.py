"""Cells as tasks of Ray: every group of cells is one task, and its lines come back to the process that writes them.

Ray says where a task runs, and starts it again where its machine was lost; the run then goes on from its newest
checkpoint. All machines need the repository, its environment, models, data and the folder of the runs under the same
paths, as in a shared file system.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.cells import Cell, Record, Score, run_group


def run_on_ray(groups: Sequence[Sequence[Cell]], runs: Path, score: Score, cores: int) -> Iterator[Record]:
    """Yields the lines of all groups, those of a group together, in the order in which they end.

    The cluster is the one that this process is connected to, else that of RAY_ADDRESS, else one of this machine alone.

    Args:
      groups: cells to train at once, a task each.
      runs: folder of the run directories.
      score: as in `run_cells`.
      cores: CPU cores that a task takes; it takes one GPU too, where the cluster has any.

    Raises:
      ModuleNotFoundError: Ray is not installed; says which extra to install.
      ray.exceptions.RayError: tasks failed; raised for the first of them once the others have ended.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--ray needs Ray. Install stable-lora-jax[ray], or leave --ray out.") from error
    if not ray.is_initialized():
        ray.init()
    gpus, runs = 1 if ray.cluster_resources().get("GPU") else 0, runs.resolve()

    def lines_of(group: Sequence[Cell]) -> list[Record]:
        return list(run_group(group, runs, score))

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
