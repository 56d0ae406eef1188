"""Runs whose stages stand beside each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from beside.cases import add, begin


@pytest.fixture(scope="session")
def made(tiny_folder, sentiment, tmp_path_factory) -> dict[str, Path]:
    """Runs whose stages a, b, c stand beside each other: all, without b, and a alone."""
    first = begin(tiny_folder, sentiment, tmp_path_factory.mktemp("beside") / "run")
    found = {"a": first}
    for names in ("abc", "ac"):
        found[names] = Path(shutil.copytree(first, tmp_path_factory.mktemp(names) / "run"))
        for name in names[1:]:
            add(sentiment, found[names], name)
    return found


@pytest.fixture
def abc(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["abc"], tmp_path / "abc"))


@pytest.fixture
def ac(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["ac"], tmp_path / "ac"))


@pytest.fixture
def only_a(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["a"], tmp_path / "a"))
