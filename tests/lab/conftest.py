"""A finished experiment for the tests of the lab."""

from __future__ import annotations

import pytest

from chainlora_lab import make_experiment, run_cells
from lab.cases import tree


@pytest.fixture
def small(tiny_folder, sentiment):
    """Return a function that makes the experiment of `cases.tree`, of keys that differ."""
    return lambda **keys: make_experiment(tree(tiny_folder, sentiment, **keys))


@pytest.fixture(scope="session")
def done(tiny_folder, sentiment, tmp_path_factory):
    """The small experiment of `cases.tree`, run: (experiment, folder, outcome)."""
    out = tmp_path_factory.mktemp("experiment")
    experiment = make_experiment(tree(tiny_folder, sentiment))
    return experiment, out, run_cells(experiment, out, backend="inline")
