"""Extension points that are folders: a new file in one of them is a new entry, without an edit."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def entries(package: ModuleType, table: str) -> dict[str, Any]:
    """Return the entries of the tables called `table` in all modules of a package."""
    found: dict[str, Any] = {}
    for module in iter_modules(package.__path__):
        found |= getattr(import_module(f"{package.__name__}.{module.name}"), table, {})
    return found
