"""Importing the package is light: JAX and Optax alone."""

import subprocess
import sys

HEAVY = (
    *("transformers", "datasets", "torch", "flax", "tokenizers", "grain", "orbax", "matplotlib", "tyro"),
    *("safetensors", "huggingface_hub", "gguf", "jinja2", "tqdm"),
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_loads_nothing_heavy():
    # What Optax itself loads is not ours to answer for.
    report = "import sys; print(*(name for name in {} if name in sys.modules))"
    ours = run(f"import stable_lora_jax; stable_lora_jax.stable_lora; {report.format(HEAVY)}")
    optax = run(f"import jax, optax; {report.format(HEAVY)}")
    assert ours == optax
    assert not {"transformers", "torch", "flax", "orbax", "matplotlib"} & set(ours.split())


def test_a_command_answers_signals_before_it_imports_anything():
    assert (
        run("import stable_lora_jax.cli, sys; print('jax' in sys.modules, 'numpy' in sys.modules)") == "False False\n"
    )


def test_takes_about_as_long_as_jax_and_optax():
    # In one process and in its own seconds, because what else the machine does would drown the difference.
    code = """if True:
        from time import process_time
        start = process_time()
        import jax, optax
        base = process_time()
        import stable_lora_jax.optim
        print((process_time() - start) / (base - start))
    """
    ratios = [float(run(code)) for _ in range(3)]
    assert min(ratios) <= 1.3, ratios
