"""Where a run lives: a folder of a file system, or a prefix of a bucket of Google Cloud Storage (gs://BUCKET/...).

An object store differs in what a run relies on. It has no folders apart from their files, cannot append, rename or
lock; but every write of a file is whole or not there, which a file system only gives to a rename.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

# A Path, or an epath.Path: nothing but the methods that both have is used of it.
if TYPE_CHECKING:
    Location = Path
else:
    Location = os.PathLike

# Of gs://bucket, a Path keeps one slash.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")


def is_url(path: str | os.PathLike[str] | None) -> bool:
    """Returns whether this is a URL, or the Path that was made of one.

    Examples:
      >>> is_url(Path("gs://bucket/run")), is_url("runs/demo")
      (True, False)
    """
    return path is not None and _URL.match(os.fspath(path)) is not None


def location(path: str | os.PathLike[str]) -> Location:
    """Returns a path whose methods read and write where `path` says: in the file system, or in a bucket.

    Args:
      path: of a file system; or gs://BUCKET/..., also as the Path that was made of it.

    Raises:
      ValueError: another kind of URL, or the package for this kind is missing.
    """
    text = os.fspath(path)
    if (url := _URL.match(text)) is None:
        return Path(text)
    if url[1] != "gs":
        raise ValueError(
            f"{text} is a URL that nothing here reads or writes. Give gs://BUCKET/..., or a folder in a file system "
            "that all hosts share."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text} needs the package gcsfs. Run: pip install 'stable-lora-jax[gcs]'")
    from etils import epath
    from fsspec.config import conf

    # Listings that are kept hide what other processes write, such as the run that `stable-lora watch` follows.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return cast(Location, epath.Path(f"gs://{text[url.end() :]}"))


def check_local(**paths: str | os.PathLike[str] | None) -> None:
    """Raises ValueError, with its name, for a URL where only a path of the file system will do."""
    for name, path in paths.items():
        if is_url(path):
            raise ValueError(
                f"{name}={os.fspath(path or '')} is a URL; it would become a local folder of that name. Give a path in "
                "a file system."
            )


def write_whole(path: Location, content: bytes) -> None:
    """Writes a file that appears whole or not at all, in place of one that is there.

    Args:
      path: from `location`; its folder exists.
      content: of the file.
    """
    if is_url(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def delete(path: Location) -> None:
    """Deletes a file, a link, or a folder with all that is in it."""
    if not isinstance(path, Path):  # an epath.Path
        path.rmtree() if path.is_dir() else path.unlink()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a file of the file system with the content of one, for readers that know no other: itself, or a copy."""
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(location(path).read_bytes())
        file.flush()
        yield Path(file.name)
