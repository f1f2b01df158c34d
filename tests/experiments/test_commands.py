"""Every command of an experiment that a document names starts, and has the options that it is given there."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMED_IN = ("README.md", "Makefile", "CONTRIBUTING.md", "docs/**/*.md", "experiments/**/*.md", "experiments/**/*.py")
NAMED_IN += ("experiments/launch/*.sh", "experiments/launch/*.yaml")


def commands() -> dict[str, set[str]]:
    """Returns module -> options that documents give it."""
    found: dict[str, set[str]] = {}
    named = re.compile(r"-m\s+(experiments(?:\.\w+)+)((?:[ \\\n]+[^\s`#)]+)*)")
    for file in sorted({file for pattern in NAMED_IN for file in ROOT.glob(pattern)}):
        for module, options in named.findall(file.read_text()):
            if module.islower():  # and no EXPERIMENT to be filled in
                found.setdefault(module, set()).update(re.findall(r"--[a-z][a-z-]*", options))
    return found


@pytest.mark.parametrize(("module", "options"), commands().items())
def test_command_starts(module, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"{module.replace('.', '/')}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert ended.value.code == 0
    missing = {option for option in options if not re.search(rf"{option}\b", told)}
    assert not missing, f"{module} has no {missing}"


def test_all_are_found():
    assert {"experiments.studies.pilot", "experiments.bench_gpu", "experiments.demo"} <= set(commands())
    assert "--results" in commands()["experiments.studies.small_decoder"]
