"""What processes keep of their compilations: whole entries, also when some of them are killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from stable_lora_jax.training import compilation_cache

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
with compilation_cache(Path(sys.argv[1]), int(sys.argv[3])):
    print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()))
    if sys.argv[2] == "hang":
        print("compiled", flush=True)
        time.sleep(60)
print("hits", len(hits))
assert jax.config.jax_compilation_cache_dir is None
"""


def start(folder, what="end", limit=2**30, **env) -> subprocess.Popen:
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_", "XLA_"))} | env
    command = [sys.executable, "-c", PROGRAM, str(folder), what, str(limit)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def hits(process: subprocess.Popen) -> int:
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return int(told.split()[-1])


def shared(folder) -> dict[str, bytes]:
    (machine,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in machine.iterdir() if path.is_file()}


def test_later_processes_find_what_earlier_ones_compiled(tmp_path):
    folder = tmp_path / "cache"
    assert hits(start(folder)) == 0
    entries = shared(folder)
    assert entries
    assert hits(start(folder)) == len([name for name in entries if name.endswith("-cache")])
    assert shared(folder) == entries
    assert not list(folder.glob("*/process-*"))


def test_a_killed_process_leaves_nothing_that_is_read(tmp_path):
    folder = tmp_path / "cache"
    hung = start(folder, "hang")
    assert hung.stdout is not None
    while "compiled" not in hung.stdout.readline():
        assert hung.poll() is None
        time.sleep(0.01)
    assert shared(folder) == {}
    alive = hits(start(folder))  # does not touch the folder of the one that lives
    assert alive == 0
    assert len(list(folder.glob("*/process-*"))) == 1
    hung.send_signal(signal.SIGKILL)
    hung.communicate()
    assert hits(start(folder)) > 0
    assert not list(folder.glob("*/process-*"))


def test_the_limit_deletes_the_oldest(tmp_path):
    hits(start(tmp_path / "cache"))
    hits(start(tmp_path / "cache", limit=0))
    assert shared(tmp_path / "cache") == {}


@pytest.mark.parametrize("env", [{"JAX_ENABLE_COMPILATION_CACHE": "0"}, {"JAX_COMPILATION_CACHE_DIR": "own"}])
def test_what_jax_is_told_stands(tmp_path, env):
    env = {name: str(tmp_path / value) if value == "own" else value for name, value in env.items()}
    process = start(tmp_path / "cache", **env)
    process.communicate(timeout=60)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert hits(start(tmp_path / "cache")) == 0
