"""Rows of benchmarks/stages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "stages"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    names = ("links", "run")  # other folders have files of such names, too
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("run")
    for name in names:
        sys.modules.pop(name, None)


def test_rows_are_dealt_balanced_and_mixed(run):
    assert sorted(run.dealt("abc", 6, "k")) == list("aabbcc")
    assert run.dealt("abcdef", 6, "k") != run.dealt("abcdef", 6, "other")
    turns = run.balanced(["aaa", "bbb"], 8, "k")
    assert turns == list("abababab")
    assert "".join(run.mixed("nnnnnnnn", "oo")) == "nnonnnnonn"
