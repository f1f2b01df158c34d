"""Key-value metadata of a GGUF file, read in a few hundredths of a second.

The `gguf` package wraps each of the 98,000 tokens and merges in several NumPy views, which takes seconds at every
start. A tokenizer needs only the header, which is a flat list of typed values.
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

# Value types by their number in the file; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


_MAX_DEPTH = 4  # of arrays inside of arrays; real files have one
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes that describe a tensor: length of its name, axes, type, offset


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Returns every key of the header with its Python value (int, float, bool, str, or list of these).

    The file is `GGUF`, version, tensor count, key count, then (key, type, value) per key, little endian. No length that
    the header claims is believed before the file is known to be that long.

    Args:
      path: a GGUF file of version 2 or 3.

    Returns:
      Metadata in file order, e.g. `{"general.architecture": "llama", ...}`.

    Raises:
      ValueError: not a GGUF file, a version or value type that is not known, or a header that claims more than the
        file holds.
      FileNotFoundError: no such file.

    Reference: the GGUF specification of the ggml project.
    """
    with Path(path).open("rb") as file:
        header = _Header(file, os.fstat(file.fileno()).st_size)
        magic, version = struct.unpack("<4sI", file.read(8).ljust(8))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(
                f"{path} begins with {magic!r}, version {version}; only GGUF files of version 2 and 3 (little endian) "
                "can be read. Convert the model again with a current converter."
            )
        try:
            tensors, count = header.scalars("Q", 2)
            metadata = {header.string(): header.value(header.scalars("I")[0]) for _ in range(header.claimed(count, 13))}
            header.claimed(tensors, _SMALLEST_TENSOR)
            return metadata
        except (struct.error, UnicodeDecodeError, _TooLongError) as error:
            raise ValueError(f"{path} has a damaged or cut header ({error}); fetch the file again.") from error


class _TooLongError(Exception):
    """The header claims more than the file holds."""


class _Header:
    """Reads typed values from the front of a file of `size` bytes."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def claimed(self, count: int, smallest: int) -> int:
        """Returns the count, if so many items of at least `smallest` bytes fit into what is left of the file."""
        left = self._size - self._file.tell()
        if count * smallest > left:
            raise _TooLongError(f"it claims {count} items where {left} bytes are left")
        return count

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        item = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{self.claimed(count, item)}{code}", self._file.read(count * item))

    def string(self) -> str:
        return self._file.read(self.claimed(self.scalars("Q")[0], 1)).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, count = self.scalars("I")[0], self.scalars("Q")[0]
            if item_kind in _SCALARS:
                return list(self.scalars(_SCALARS[item_kind], count))
            if depth == _MAX_DEPTH:
                raise _TooLongError(f"arrays are nested more than {_MAX_DEPTH} deep")
            return [self.value(item_kind, depth + 1) for _ in range(self.claimed(count, 8))]
        if kind not in _SCALARS:
            raise ValueError(f"GGUF value type {kind} is not known; known are 0 to 12. Fetch the file again.")
        return self.scalars(_SCALARS[kind])[0]
