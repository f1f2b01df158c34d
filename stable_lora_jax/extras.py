"""What a missing optional package is answered with: one sentence that names the extra to install."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turns an import inside the block that finds no package into an error that says which extra brings it.

    Args:
      extra: a name below [project.optional-dependencies], e.g. "train".

    Raises:
      ModuleNotFoundError: the package's name, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "stable_lora_jax"):
            raise
        raise ModuleNotFoundError(
            f"The package {package!r} is missing. Run: pip install 'stable-lora-jax[{extra}]'", name=error.name
        ) from error
