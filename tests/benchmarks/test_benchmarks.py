"""What lies beside the package: its imports from the package exist."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file for room in ("benchmarks", "examples", "site") for file in (ROOT / room).rglob("*.py")
)


def imports(file: Path):
    """Every ``(module, name)`` that a file imports from chainlora, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_imported_from_the_package_exists(file):
    for module, name in imports(file):
        if module.split(".")[0] != "chainlora":
            continue
        assert find_spec(module), module
        if name is not None and not hasattr(importlib.import_module(module), name):
            assert find_spec(f"{module}.{name}"), f"{module}.{name}"
