"""What the documents show must run: programs and notebooks. The program with Tunix runs in its own tests."""

import importlib
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.documents import programs

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix uses what Flax has renamed
def test_the_programs_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (on_a_pytree,) = programs()
    exec(on_a_pytree, {})
    assert "PairStability(norm_a=" in capsys.readouterr().out
    exec(programs("docs/use/optax.md")[0], {})
    assert capsys.readouterr().out.startswith("q_proj/lora ")
    names: dict[str, Any] = {}
    exec(programs("docs/use/flax.md")[0], names)
    assert re.fullmatch(r"(layers/\d/lora: gap \d+\.\d\d, (stable|still shrinking)\n){2}", capsys.readouterr().out)
    assert (tmp_path / "stability.png").stat().st_size > 10_000
    exec(programs("docs/use/qwix.md")[0], names)
    adapters = names["nnx"].state(names["model"], names["nnx"].LoRAParam)
    report = names["stability"](adapters, names["optimizer"].opt_state)
    assert list(report) == ["layers/0/kernel_lora", "layers/2/kernel_lora"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_every_public_name_is_in_the_reference():
    packages = [path.stem for path in (ROOT / "docs" / "api").glob("*.md")]
    assert len(packages) == 9
    for name in packages:
        page = (ROOT / "docs" / "api" / f"{name}.md").read_text()
        shown = re.findall(rf"^::: stable_lora_jax\.{name}\.(?:\w+\.)?(\w+)$", page, flags=re.MULTILINE)
        assert sorted(shown) == sorted(importlib.import_module(f"stable_lora_jax.{name}").__all__), name


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook client's own dependencies
def test_every_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) or output.get("text") for output in shown), "commit its outputs"
    # As Jupyter starts it: beside the file, and without the flags by which tests compile quickly and compute slowly.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute(env=environment)
