"""What the documents show must run: the README's program and every notebook."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def test_the_readme_program_runs(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(program, {})
    assert re.fullmatch(r"(layers/\d/lora: gap \d+\.\d\d, (stable|still shrinking)\n){2}", capsys.readouterr().out)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook client's own dependencies
def test_every_notebook_runs(path):
    NotebookClient(nbformat.read(path, as_version=4), timeout=120).execute()
