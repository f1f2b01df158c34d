"""Key-value metadata of a GGUF file, read in a few hundredths of a second.

The `gguf` package wraps each of the 98,000 tokens and merges in several NumPy views, which takes seconds at every
start. A tokenizer needs only the header, which is a flat list of typed values.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

# Value types by their number in the file; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Every key of the header with its Python value (int, float, bool, str, or list of these).

    The file is `GGUF`, version, tensor count, key count, then (key, type, value) per key, little endian.

    Args:
        path: a GGUF file of version 2 or 3.

    Returns:
        Metadata in file order, e.g. `{"general.architecture": "llama", ...}`.

    Raises:
        ValueError: not a GGUF file, or a version or value type that is not known.
        FileNotFoundError: no such file.

    Reference: the GGUF specification of the ggml project.
    """
    with Path(path).open("rb") as file:
        magic, version = struct.unpack("<4sI", file.read(8).ljust(8))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(
                f"{path} begins with {magic!r}, version {version}; only GGUF files of version 2 and 3 (little endian) "
                "can be read. Convert the model again with a current converter."
            )
        try:
            _, count = _scalars(file, "Q", 2)
            return {_string(file): _value(file, _scalars(file, "I")[0]) for _ in range(count)}
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} has a damaged or cut header ({error}); fetch the file again.") from error


def _scalars(file: BinaryIO, code: str, count: int = 1) -> tuple[Any, ...]:
    layout = struct.Struct(f"<{count}{code}")
    return layout.unpack(file.read(layout.size))


def _string(file: BinaryIO) -> str:
    return file.read(_scalars(file, "Q")[0]).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item_kind, count = _scalars(file, "I")[0], _scalars(file, "Q")[0]
        if item_kind in _SCALARS:
            return list(_scalars(file, _SCALARS[item_kind], count))
        return [_value(file, item_kind) for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"GGUF value type {kind} is not known; known are 0 to 12. Fetch the file again.")
    return _scalars(file, _SCALARS[kind])[0]
