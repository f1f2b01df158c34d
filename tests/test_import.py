"""Importing the package is light: JAX and Optax alone."""

import subprocess
import sys
import time

HEAVY = (
    *("transformers", "datasets", "torch", "flax", "tokenizers", "grain", "orbax", "matplotlib", "tyro"),
    *("safetensors", "huggingface_hub", "gguf", "jinja2", "tqdm"),
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_loads_nothing_heavy():
    # What Optax itself loads is not ours to answer for.
    report = "import sys; print(*(name for name in {} if name in sys.modules))"
    ours = run(f"import stable_lora_jax; {report.format(HEAVY)}")
    optax = run(f"import jax, optax; {report.format(HEAVY)}")
    assert ours == optax
    assert not {"transformers", "torch", "flax", "orbax", "matplotlib"} & set(ours.split())


def test_takes_about_as_long_as_jax_and_optax():
    seconds: dict[str, list[float]] = {"import jax, optax": [], "import stable_lora_jax": []}
    for _ in range(5):
        for code, times in seconds.items():
            start = time.perf_counter()
            run(code)
            times.append(time.perf_counter() - start)
    base, ours = map(min, seconds.values())  # what else the machine does only ever adds
    assert ours / base <= 1.3, seconds
