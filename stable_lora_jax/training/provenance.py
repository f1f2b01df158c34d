"""What made a file: the commit of a checkout, versions of packages."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path, tracked: Sequence[str] = (".",)) -> str | None:
    """Returns the git commit of the checkout that a folder of Python files belongs to; None if it belongs to none.

    Args:
      folder: it must contain an `__init__.py` that git knows: installed into somebody else's repository, it has none.
      tracked: paths, relative to the folder; the commit has "+" behind it if files there were changed since.
    """
    where = ["git", "-C", str(folder)]
    try:
        subprocess.run([*where, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        head = subprocess.run([*where, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*where, "status", "--porcelain", "--", *tracked], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")
