"""Which packages may import which: each builds on those before it, and examples are written for the library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
LAYERS = {
    "modeling_fspad": "fspad",
    "bench": "fspad.bench",
    "hub_cards": "fspad.hub_cards",
    "trainer": "fspad.trainer",
    "serving": "fspad.serving",
    "cli": "fspad.cli",
}
PACKAGES = [*LAYERS.values()]
FILES = [path for folder in LAYERS for path in sorted((ROOT / folder).glob("*.py"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def imported_names(source: str, package: str) -> Iterator[str]:
    """Absolute names of everything that a file of a package imports, wherever in it, type checking included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


def offences(source: str, package: str, forbidden: list[str]) -> list[str]:
    return [
        name
        for name in imported_names(source, package)
        if any(name == other or name.startswith(f"{other}.") for other in forbidden)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packages_import_only_those_before_them(path):
    package = LAYERS[path.parent.name]
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    assert offences(path.read_text(encoding="utf-8"), package, later) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_do_not_import_the_command_line(path):
    assert offences(path.read_text(encoding="utf-8"), "", ["fspad.cli"]) == []


def test_the_metric_of_evaluate_is_for_users_alone():
    for path in [*FILES, *EXAMPLES]:
        if path.name != "draft_acceptance.py":
            package = LAYERS.get(path.parent.name, "")
            found = offences(path.read_text(encoding="utf-8"), package, ["evaluate", "fspad.bench.draft_acceptance"])
            assert found == [], path.name


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import fspad.cli.train", "fspad"),
        ("from fspad import cli", "fspad.bench"),
        ("from fspad.cli import app", ""),
        ("def f():\n    from .cli.main import app", "fspad"),
        ("from . import cli", "fspad"),
        ("from ..cli import app", "fspad.bench"),
        ("from .. import cli", "fspad.bench"),
        ("if TYPE_CHECKING:\n    from fspad.cli.main import app", "fspad.trainer"),
    ],
)
def test_imports_are_found_however_they_are_written(source, package):
    assert offences(source, package, ["fspad.cli"])


def test_siblings_and_similar_names_are_no_offence():
    assert offences("from .cli import app\nimport fspad.client", "fspad.bench", ["fspad.cli"]) == []
