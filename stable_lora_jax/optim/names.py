"""The names by which LoRA libraries tell A from B, and the orientation that each of them stores its matrices in.

A leaf is an A or a B by the last component of its path that follows one of these conventions:

| convention | A | orientation |
|---|---|---|
| Flax, ours, openpi, MaxText | ``lora_a``, ``lora_a.kernel``, ``gating_einsum_lora_a`` | (n, r), (r, m) |
| Qwix | ``kernel_lora_a``, ``w_lora_a`` | (n, r), (r, m) |
| Keras | ``lora_kernel_a`` | (n, r), (r, m) |
| google/gemma | ``lora/a`` | (n, r), (r, m) |
| PEFT, levanter | ``lora_A.weight``, ``lora_A.default.weight``, ``lora_A/weight`` | torch: (r, n), (m, r) |
| kohya | ``lora_down.weight``, B is ``lora_up.weight`` | torch: (r, n), (m, r) |
| SkyRL, LitGPT | ``lora_A``, ``lora_B`` and nothing below | either, by the shapes |

A pair is called by that path without the letter: ``q_proj/lora_a`` and ``q_proj/lora_b`` are ``q_proj/lora``. A bias
below an A or a B (``lora_a/bias``, ``lora_B.default.bias``) belongs to no pair. The tuple keys of
`flax.traverse_util.flatten_dict` count as components. `flax.nnx.Optimizer` passes variables to ``init``, whose paths
end in ``.value``, and bare arrays to ``update``: that ending is not part of a name.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

Path: TypeAlias = tuple[str, ...]
Orientation: TypeAlias = Literal["flax", "torch"]

LORA_A, LORA_B, OTHER = "lora_a", "lora_b", "other"

_LETTER = re.compile(r"(?P<head>(?:.*[._/])?lora(?:_[A-Za-z0-9_]+)?)_(?P<side>[abAB])(?P<tail>\..*)?")
_DIRECTION = re.compile(r"(?P<head>(?:.*[._/])?lora)_(?P<side>down|up)(?P<tail>\..*)?")
_QWIX = re.compile(r"(?:.*[./])?(?P<weight>[^./]+)_lora_[ab]")


class Name(NamedTuple):
    """What the path of an A or a B says."""

    pair: str
    side: str  # LORA_A or LORA_B
    orientation: Orientation | None  # None: the convention has no fixed orientation
    qwix_weight: str | None  # the name of the layer's weight, where the convention is Qwix's


def parse_name(path: Path) -> Name | None:
    """Returns what `path` says if it is the path of an A or a B, else None."""
    for depth in reversed(range(len(path))):
        found = _split(path, depth)
        if found is None:
            continue
        head, side, tail = found
        below = [part for component in (tail, *path[depth + 1 :]) for part in component.split(".") if part]
        if "bias" in below:
            return None
        pair = "/".join(part for part in (*path[:depth], head + tail, *path[depth + 1 :]) if part)
        orientation = "torch" if "weight" in below else "flax" if side in ("a", "b") else None
        qwix = _QWIX.fullmatch(path[depth]) if orientation == "flax" else None
        label = LORA_A if side in ("a", "A", "down") else LORA_B
        return Name(pair, label, orientation, qwix["weight"] if qwix else None)
    return None


def _split(path: Path, depth: int) -> tuple[str, str, str] | None:
    """Returns (the component without its side, the side, what follows in the component) at `depth`, or None."""
    match = _LETTER.fullmatch(path[depth]) or _DIRECTION.fullmatch(path[depth])
    if match:
        return match["head"], match["side"], match["tail"] or ""
    if path[depth] in ("a", "b") and depth and re.fullmatch(r"(?:.*[._/])?lora", path[depth - 1]):
        return "", path[depth], ""
    return None


def leaf_paths(tree: Any) -> list[Path]:
    """Returns the path of every leaf, None included, as strings."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)
    return [key_path(keys) for keys, _ in flat]


def key_path(keys: Sequence[Any]) -> Path:
    """Returns the components of a leaf's path, without the ``.value`` of a variable."""
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return tuple(component for key in keys for component in _components(key))


def _components(key: Any) -> Iterator[str]:
    if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, tuple):
        yield from map(str, key.key)
    else:
        yield jax.tree_util.keystr((key,), simple=True)


def show_paths(paths: Sequence[Path], most: int = 12) -> str:
    """Returns the paths for a message, the first dozen of them."""
    shown = ", ".join("'" + "/".join(path) + "'" for path in paths[:most])
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return f"[{shown}{more}]"
