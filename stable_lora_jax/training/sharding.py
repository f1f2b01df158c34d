"""Where arrays live: one mesh of three axes, and one table of rules.

``data`` splits the batch and repeats the weights; ``fsdp`` splits the batch and the frozen weights, which are gathered
layer by layer; ``tensor`` splits the weights' wide axes and the work on them. Adapters and optimizer state are small
and repeated everywhere.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from stable_lora_jax.models.decoder import AS_IT_IS, Decoder, Placement

AXES = ("data", "fsdp", "tensor")

# An abstract mesh has sizes and no devices: enough to say what each device would hold.
AnyMesh: TypeAlias = Mesh | AbstractMesh

# First match wins; paths are dotted. The last axes of a parameter take the rule's, further leading ones (layers) none.
_FROZEN_RULES = (
    (r".*\.(q|k|v|gate|up)_proj(\.base)?\.(kernel|scale)", ("fsdp", "tensor")),
    (r".*\.(o|down)_proj(\.base)?\.(kernel|scale)", ("tensor", "fsdp")),
    (r"embed_tokens(\.base)?\.embedding", ("tensor", "fsdp")),
    (r"lm_head(\.base)?\.kernel", ("fsdp", "tensor")),
    (r".*", ()),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over the first data · fsdp · tensor devices.

    A mesh of all devices of a TPU slice is laid out so that neighbours in it are neighbours in the slice.

    Args:
      data, fsdp, tensor: sizes of the axes.
      devices: to choose from, e.g. those of a slice that is only compiled for; all that are attached if None.

    Raises:
      ValueError: a size below one, more devices asked for than there are, or, among several processes, fewer.
    """
    devices = jax.devices() if devices is None else devices
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
    if math.prod(sizes) == len(devices):
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.reshape(np.array(devices[: math.prod(sizes)]), sizes), AXES)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_rows(mesh: AnyMesh, rows: int, accumulate: int = 1) -> None:
    """Raises ValueError unless a batch of so many rows splits into `accumulate` parts, and each over the mesh."""
    if accumulate < 1 or rows % accumulate:
        raise ValueError(
            f"A batch of {rows} rows does not split into accumulate={accumulate} equal parts. Choose accumulate among "
            "the divisors of the batch."
        )
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if rows % (data * fsdp * accumulate):
        if accumulate > 1:
            raise ValueError(
                f"A batch of {rows} rows in accumulate={accumulate} parts has {rows // accumulate} rows a part, which "
                f"do not split evenly over data={data} times fsdp={fsdp} devices. Choose a batch size that is a "
                f"multiple of {data * fsdp * accumulate}, a smaller accumulate, or a smaller mesh."
            )
        raise ValueError(
            f"A batch of {rows} rows does not split evenly over data={data} times fsdp={fsdp} devices. Choose a batch "
            f"size that is a multiple of {data * fsdp}, or a smaller mesh."
        )


def check_decoder(mesh: AnyMesh, decoder: Decoder) -> None:
    """Raises ValueError unless the mesh divides the decoder: ``tensor`` its heads, all axes the widths they split."""
    config, tensor = decoder.config, mesh.shape["tensor"]
    for name in ("num_heads", "num_kv_heads"):
        if (heads := getattr(config, name)) % tensor:
            shared = math.gcd(config.num_heads, config.num_kv_heads)
            raise ValueError(
                f"The mesh axis tensor={tensor} does not divide the model's {name}={heads}; a head is not split. "
                f"Choose tensor among {', '.join(str(n) for n in range(1, shared + 1) if shared % n == 0)}, and spread "
                "the other devices over data and fsdp."
            )
    frozen_shardings(mesh, nnx.as_pure(nnx.state(decoder, nnx.Param)))


def frozen_shardings(mesh: AnyMesh, frozen: nnx.State) -> nnx.State:
    """Returns a sharding for every frozen parameter, by the table of rules.

    Raises:
      ValueError: an axis that the mesh does not divide (parameter and sizes named).
    """
    sharding = parameter_sharding(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharding(_dotted(path), leaf.shape), frozen)


def parameter_sharding(mesh: AnyMesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns a function from dotted path and shape of a frozen parameter to its sharding, by the table of rules.

    It raises ValueError for an axis that the mesh does not divide (parameter and sizes named).
    """

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = _spec(mesh, name, shape)
        for size, axis in zip(shape, spec, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"The mesh axis {axis}={mesh.shape[axis]} does not divide the {size} of {name} {shape}. "
                    f"Choose a size of {axis} that divides it."
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding


@functools.cache  # the same one for the same mesh: with another, what is compiled for it would be compiled anew
def placement_on(mesh: Mesh) -> Placement:
    """Returns where a step's arrays live while they are used; on one device, as they are.

    Weights come out whole over fsdp, and split over tensor as they were; activations stay split by rows. Left to
    itself, the partitioner may gather a batch instead of a weight, and hold results of the whole batch.
    """
    if mesh.size == 1:
        return AS_IT_IS

    def weights(path: str, params: Any) -> Any:
        def whole(inner: tuple[object, ...], leaf: jax.Array) -> jax.Array:
            name = ".".join(filter(None, (path, _dotted(inner))))
            spec = (None if axis == "fsdp" else axis for axis in _spec(mesh, name, leaf.shape))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree_util.tree_map_with_path(whole, params)

    def local(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        rows, heads = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), None, "tensor")

        def call(*arrays: jax.Array) -> jax.Array:
            specs = tuple(heads if array.ndim == 4 else rows for array in arrays)
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)

        return call

    return Placement(
        weights=weights,
        rows=lambda hidden: jax.lax.with_sharding_constraint(hidden, batch_sharding(mesh)),
        row_splits=mesh.shape["data"] * mesh.shape["fsdp"],
        local=local,
    )


def _spec(mesh: AnyMesh, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    rule = next(rule for pattern, rule in _FROZEN_RULES if re.fullmatch(pattern, name))
    spec = (*(None,) * (len(shape) - len(rule)), *rule)
    if not name.endswith(".scale"):
        return spec
    # A quantized kernel's scales go with it, but where they are too few to be split.
    return tuple(
        axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, spec, strict=True)
    )


def _dotted(path: tuple[object, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path).removesuffix(".value")
