"""The built wheel in an empty environment: four packages, and one sentence for each extra that is missing."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import programs

pytestmark = [pytest.mark.network, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
CORE = ("jax", "jaxtyping", "numpy", "optax")


def run(*command: str | Path, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: tuple[str, ...]) -> set[str]:
    """Returns what these packages need, as the metadata of this environment tells."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel and what it brings."""
    folder = tmp_path_factory.mktemp("install")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    return python


def test_four_packages_and_what_they_need(installed: Path) -> None:
    listed = run(installed, "-m", "pip", "list", "--format", "freeze").split()
    names = {canonical(line.partition("==")[0]) for line in listed} - {"pip", "setuptools"}
    assert names == closure(CORE) | {"stable-lora-jax"}
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"stable-lora-jax=={version[1]}" in [line.replace("_", "-") for line in listed]


def test_the_readme_first_program_runs(installed: Path, tmp_path: Path) -> None:
    assert "PairStability(norm_a=" in run(installed, "-c", programs()[0], cwd=tmp_path)


def test_a_missing_extra_is_one_sentence(installed: Path, tmp_path: Path) -> None:
    extras = {"lora": "flax", "plots": "plots"}
    extras |= dict.fromkeys(("models", "training", "evaluation", "finetune"), "train")
    for module, extra in extras.items():
        code = f"import stable_lora_jax.{module}"
        done = subprocess.run([installed, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        sentence = rf"ModuleNotFoundError: The package '\w+' is missing. Run: pip install 'stable-lora-jax\[{extra}\]'"
        assert re.fullmatch(sentence, done.stderr.strip().splitlines()[-1]), done.stderr
    command = installed.with_name("stable-lora")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "stable-lora: The package 'tyro' is missing. Run: pip install 'stable-lora-jax[train]'\n"
