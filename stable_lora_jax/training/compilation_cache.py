"""JAX's persistent compilation cache, shared by processes that may be killed at any moment.

JAX writes an entry in place, and never replaces one that is there: what is left of a process that was killed while
writing is read with a warning, and compiled again, by every later process. So each process has a folder of its own,
filled with links to the shared entries, and what it adds is renamed into the shared folder when it ends. What a killed
process has added is lost with its folder, which the next one deletes.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from stable_lora_jax.training.provenance import versions

LIMIT = 4 * 2**30
_PRIVATE, _LOCK = "process-", ".lock"


@contextlib.contextmanager
def compilation_cache(folder: Path, limit: int = LIMIT) -> Iterator[None]:
    """Keeps what is compiled in the block, where that takes a second or more, for later processes.

    Does nothing where JAX is told what to do: by `JAX_COMPILATION_CACHE_DIR`, or `JAX_ENABLE_COMPILATION_CACHE=0`.

    Args:
      folder: of the shared entries, in one for each processor and versions of JAX. If it cannot be written, nothing is
        kept.
      limit: bytes; the entries that were added first are deleted beyond it.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        yield
        return
    shared = folder / _machine()
    try:
        shared.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=shared))
    except OSError:
        yield
        return
    with FileLock(private / _LOCK):
        _delete_abandoned(shared)
        for entry in _entries(shared):
            with contextlib.suppress(OSError):  # another process deleted it just now
                os.link(entry, private / entry.name)
        # XLA's own caches lie below the private folder, whose path would then be a part of JAX's keys.
        xla_caches = jax.config.jax_persistent_cache_enable_xla_caches
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        jax.config.update("jax_compilation_cache_dir", str(private))
        jax_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            jax.config.update("jax_persistent_cache_enable_xla_caches", xla_caches)
            jax_cache.reset_cache()
            _publish(private, shared, limit)
    shutil.rmtree(private, ignore_errors=True)


def _machine() -> str:
    """Returns a name for what compiled code depends on and JAX's key does not hold: the processor's instructions."""
    listed = Path("/proc/cpuinfo")  # of Linux; the machines of a cluster may share a home directory
    lines = listed.read_text().splitlines() if listed.exists() else []
    found = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join([*found, str(versions("jax", "jaxlib"))]).encode()).hexdigest()[:12]


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.name != _LOCK]


def _delete_abandoned(shared: Path) -> None:
    """Deletes the folders of processes that have ended without doing so."""
    for private in shared.glob(f"{_PRIVATE}*"):
        if not (private / _LOCK).exists():  # its owner is about to take it
            continue
        with contextlib.suppress(Timeout, OSError), FileLock(private / _LOCK, timeout=0):
            shutil.rmtree(private, ignore_errors=True)


def _publish(private: Path, shared: Path, limit: int) -> None:
    """Renames new entries into the shared folder, and deletes the oldest beyond the limit."""
    for entry in _entries(private):
        with contextlib.suppress(OSError):  # without the cache everything works as well
            entry.replace(shared / entry.name)
    kept, total = sorted(_entries(shared), key=lambda path: path.stat().st_mtime, reverse=True), 0
    for entry in kept:
        total += entry.stat().st_size
        if total > limit:
            entry.unlink(missing_ok=True)
