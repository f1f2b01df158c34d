"""Imports point one way; read from the syntax trees, so imports inside functions count too."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "stable_lora_jax"

# Small files that stand below all parts, and that everything may import.
BELOW = {"extras", "locations"}

# part of the package -> the parts of it that it may import.
ALLOWED = {
    "optim": set(),
    "assets": set(),
    "lora": {"optim"},
    "models": {"assets", "lora", "optim"},
    "data": {"assets"},
    "evaluation": {"data", "lora", "models", "optim"},
    "training": {"data", "evaluation", "lora", "models", "optim", "plots"},
    "planning": {"data", "lora", "models", "optim", "training"},
    "plots": {"optim"},
    "finetune": {"assets", "data", "evaluation", "lora", "models", "optim", "training"},
    "cli": {"assets", "data", "evaluation", "finetune", "lora", "models", "optim", "planning", "training"},
}


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (module, names taken from it) of every import in a file or a notebook's cells."""
    for node in ast.walk(ast.parse(source_of(file))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or "", [alias.name for alias in node.names]


def source_of(file: Path) -> str:
    """Returns a file's Python; of a notebook, its cells without the lines that are commands of Jupyter."""
    if file.suffix != ".ipynb":
        return file.read_text()
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in ["", *"".join(cell["source"]).splitlines()]]
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(file: Path) -> str:
    """Returns the part of the package that a file belongs to; nothing for __init__ and what is below all parts."""
    relative = file.relative_to(ROOT / PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    return part if part not in {"__init__", *BELOW} else ""


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_what_it_may(part: str) -> None:
    found = [file for file in files(PACKAGE) if part_of(file) == part]
    assert found
    for file in found:
        for module, names in imports(file):
            if module.partition(".")[0] != PACKAGE:
                assert module.partition(".")[0] not in ("experiments", "tests"), file
                continue
            parts = module.split(".")[1:2] or [name for name in names if name in ALLOWED]
            if part == "optim" and not parts:
                continue
            wrong = set(parts) - ALLOWED[part] - {part, *BELOW}
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}; {part} may import {sorted(ALLOWED[part])}"


def test_every_part_has_its_contract() -> None:
    assert {part_of(file) for file in files(PACKAGE)} - {""} == set(ALLOWED)


def test_what_only_its_entry_point_may_import() -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for file in [*files("experiments"), *notebooks]:
        for module, _ in imports(file):
            assert not module.startswith((f"{PACKAGE}.cli", "tests")), f"{file.relative_to(ROOT)} imports {module}"


def test_names_that_are_private_stay_in_their_package() -> None:
    for file in [*files(PACKAGE), *files("experiments")]:
        for module, names in imports(file):
            if module.partition(".")[0] in (PACKAGE, "experiments"):
                private = [name for name in (*module.split("."), *names) if name.startswith("_")]
                assert not private, f"{file.relative_to(ROOT)} imports {private} from {module}"


@pytest.mark.parametrize("folder", [PACKAGE, "experiments"])
def test_no_circle(folder: str) -> None:
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files(folder)
    }
    uses: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = file.name == "__init__.py"
        targets = {
            full for module, names in imports(file) for full in (module, *(f"{module}.{each}" for each in names))
        }
        # A package's __init__ imports its modules, and they import each other past it.
        uses[name] = {target for target in targets if target in modules and target != name}
        if not package:
            uses[name] -= {name.rpartition(".")[0]}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(uses[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def test_docstrings_have_one_form() -> None:
    """Google's, in the order of the table, by two spaces; and examples under their heading."""
    order = ["Args", "Attributes", "Returns", "Yields", "Raises", "Examples", "References"]
    headings = re.compile(rf"^({'|'.join(order)}):$", re.MULTILINE)
    for file in files(PACKAGE):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not (text := ast.get_docstring(node)):
                continue
            where = f"{file.relative_to(ROOT)}:{node.lineno}"
            found = headings.findall(text)
            assert found == sorted(found, key=order.index), f"{where}: {found}"
            assert ">>>" not in text or "Examples" in found, where
            indents = re.findall(rf"^(?:{'|'.join(order)}):\n( *)", text, re.MULTILINE)
            assert set(indents) <= {"  "}, where


def test_no_file_is_a_house_of_its_own() -> None:
    sizes = {
        file: len(file.read_text().splitlines()) for file in (*files(PACKAGE), *files("experiments"), *files("tests"))
    }
    assert {str(file.relative_to(ROOT)): size for file, size in sizes.items() if size > 400} == {}
    assert sorted(sizes.values())[len(sizes) // 2] <= 130
