"""Imports go down only: pipelines -> actors -> influence, with conf a leaf; no file is a drawer for odds and ends."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"conf", "influence", "actors", "pipelines"}
ALLOWED = {
    "conf": {"conf"},
    "influence": {"influence"},
    "actors": {"actors", "influence", "conf"},
    "pipelines": OURS,
}
NUMERICS = {"torch", "numpy", "scipy", "rank_bm25"}  # all that influence/ may import from elsewhere
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level package) of every import, inside functions too; relative ones are of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else (node.module or "").partition(".")[0]


def violations(source: str, layer: str) -> list[tuple[int, str]]:
    """Imports that a file of this layer must not have."""
    found = list(imported(source, layer))
    wrong = [(line, name) for line, name in found if name in OURS and name not in ALLOWED[layer]]
    if layer == "influence":
        allowed = NUMERICS | OURS | set(sys.stdlib_module_names)
        wrong += [(line, name) for line, name in found if name not in allowed]
    return wrong


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_imports_go_down_only(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in violations(path.read_text(encoding="utf-8"), layer)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_drawers() -> None:
    files = [path for folder in [*OURS, "tests", "benchmarks"] for path in (ROOT / folder).rglob("*.py")]
    assert not [str(path.relative_to(ROOT)) for path in files if {path.stem, path.parent.name} & DRAWERS]


@pytest.mark.parametrize(
    ("source", "layer", "expected"),
    [
        ("import torch\nfrom influence.batch import Batch\nimport math", "influence", []),
        ("def f():\n    import ray", "influence", [(2, "ray")]),
        ("from actors import store", "influence", [(1, "actors")]),
        ("import influence.batch as b", "conf", [(1, "influence")]),
        ("from pipelines.steps import Step", "actors", [(1, "pipelines")]),
        ("from . import schema", "conf", []),
        ("import ray\nfrom actors.store import Store", "pipelines", []),
    ],
)
def test_rule_sees_what_it_should(source: str, layer: str, expected: list[tuple[int, str]]) -> None:
    assert violations(source, layer) == expected
