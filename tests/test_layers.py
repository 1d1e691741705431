"""Imports run one way: from the outer rooms of the house to the inner ones, without exception and without a circle.

No file and no class is longer than a reader can keep in mind, and no name means two things.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import recast_peft

ROOT = Path(recast_peft.__file__).parent

# From the inside to the outside; a module may import from its own room and from those before it.
INNER = "_version errors validation names placement holders storage registration composition mimicry banks options"
OUTER = "config planning layer parts tasks model hub pool auto growth optim integrations analysis cli __init__"
ROOMS = [*INNER.split(), *OUTER.split()]


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere in it: also inside functions and for types alone."""
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        for alias in node.names:
            spellings = (
                ".".join(filter(None, [*base, *tail])) for tail in ([alias.name], [alias.name, "__init__"], [], ["__init__"])
            )
            found.add(next(spelling for spelling in spellings if spelling in known))
    return found - {name}


FILES = modules()


@cache
def graph() -> dict[str, set[str]]:
    return {name: imported(name, path, set(FILES)) for name, path in FILES.items()}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_import_runs_up(name: str) -> None:
    room = name.split(".")[0]
    above = {other for other in graph()[name] if ROOMS.index(other.split(".")[0]) > ROOMS.index(room)}
    assert not above


def test_there_is_no_circle() -> None:
    left = {name: set(imports) for name, imports in graph().items()}
    while free := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in free}
    assert not left


def test_no_file_has_more_than_400_lines() -> None:
    assert {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > 400} == {}


def test_no_class_has_more_than_250_lines() -> None:
    found = [(path, node) for path in ROOT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    classes = {f"{path.name}: {node.name}": node for path, node in found if isinstance(node, ast.ClassDef)}
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in classes.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 250} == {}


def test_no_two_files_define_one_name() -> None:
    files = {name: ast.parse(path.read_text()).body for name, path in FILES.items()}
    found: dict[str, list[str]] = {}
    for name, body in files.items():
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    assert {name: homes for name, homes in found.items() if len(homes) > 1} == {}
