"""The harness of the benchmarks: a contender measures in a process of its own, and the file is written after each."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.running.provenance import commit, machine

# The C library asks for pages of 2 MB for large buffers, where Linux offers them; else of 4 kB.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SMALL_PAGES = {"GLIBC_TUNABLES": ""}


def measured_by(
    module: str, options: Sequence[str], python: str = sys.executable, environment: Mapping[str, str] = LARGE_PAGES
) -> dict[str, Any]:
    """Returns the line of JSON that a module prints last, run in a process whose memory and threads are its own.

    Args:
      module: what `python -m` runs.
      options: its command-line options.
      python: the interpreter; another environment's for contenders on torch.
      environment: variables that the process gets beside this one's.

    Raises:
      subprocess.CalledProcessError: it failed; its own error is on the terminal.
    """
    command = [python, "-m", module, *options]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])


def write(out: Path, command: str, **result: Any) -> dict[str, Any]:
    """Writes what has been measured so far, with the command, commit and machine; returns it."""
    result = {"command": command, "commit": commit(), "machine": machine()} | result
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result
