"""Where arrays live: one mesh of three axes, and one table of rules.

``data`` splits the batch and repeats the weights; ``fsdp`` splits the batch and the frozen weights, which are gathered
layer by layer; ``tensor`` splits the weights' wide axes and the work on them. Adapters and optimizer state are small
and repeated everywhere.
"""

import math
import re

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# First match wins; paths are dotted. The last axes of a parameter take the rule's, further leading ones (layers) none.
_FROZEN_RULES = (
    (r".*\.(q|k|v|gate|up)_proj(\.base)?\.kernel", ("fsdp", "tensor")),
    (r".*\.(o|down)_proj(\.base)?\.kernel", ("tensor", "fsdp")),
    (r"embed_tokens\.embedding", ("tensor", "fsdp")),
    (r"lm_head\.kernel", ("fsdp", "tensor")),
    (r".*", ()),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh over the first data · fsdp · tensor devices.

    Raises:
      ValueError: a size below one, more devices asked for than there are, or, among several processes, fewer.
    """
    devices = jax.devices()
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1 or math.prod(sizes) > len(devices):
        raise ValueError(
            f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor} needs {math.prod(sizes)} devices; there are "
            f"{len(devices)}. Choose sizes of at least 1 with a product of at most {len(devices)}."
        )
    if jax.process_count() > 1 and math.prod(sizes) < len(devices):
        raise ValueError(
            f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor} leaves some of the {len(devices)} devices of "
            f"{jax.process_count()} processes without work. Choose sizes with a product of {len(devices)}."
        )
    return Mesh(np.reshape(devices[: math.prod(sizes)], sizes), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raises ValueError unless a batch of so many rows can be split over the mesh."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if rows % (data * fsdp):
        raise ValueError(
            f"A batch of {rows} rows does not split evenly over data={data} times fsdp={fsdp} devices. Choose a batch "
            f"size that is a multiple of {data * fsdp}, or a smaller mesh."
        )


def frozen_shardings(mesh: Mesh, frozen: nnx.State) -> nnx.State:
    """Returns a sharding for every frozen parameter, by the table of rules.

    Raises:
      ValueError: an axis that the mesh does not divide (parameter and sizes named).
    """

    def shard(path: tuple[object, ...], leaf: jax.Array) -> NamedSharding:
        name = ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path).removesuffix(".value")
        rule = next(rule for pattern, rule in _FROZEN_RULES if re.fullmatch(pattern, name))
        spec = (*(None,) * (leaf.ndim - len(rule)), *rule)
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"The mesh axis {axis}={mesh.shape[axis]} does not divide the {size} of {name} {leaf.shape}. "
                    f"Choose a size of {axis} that divides it."
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(shard, frozen)
