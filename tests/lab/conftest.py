"""A finished experiment for the tests of the lab."""

from __future__ import annotations

import pytest
import yaml

from chainlora_lab import make_experiment, run_cells
from lab.cases import tree


@pytest.fixture
def small(tiny_folder, sentiment):
    """Return a function that makes the experiment of `cases.tree`, of keys that differ."""
    return lambda **keys: make_experiment(tree(tiny_folder, sentiment, **keys))


@pytest.fixture
def base(tiny_folder, sentiment):
    """The keys that all cells of `cases.tree` share."""
    return tree(tiny_folder, sentiment)["base"]


@pytest.fixture
def written(tiny_folder, sentiment, tmp_path):
    """Return a function that writes the file of `cases.tree`, of keys that differ: its path."""

    def write(**keys):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(tree(tiny_folder, sentiment, **keys)))
        return path

    return write


@pytest.fixture(scope="session")
def done(tiny_folder, sentiment, tmp_path_factory):
    """The small experiment of `cases.tree`, run: (experiment, folder, outcome)."""
    out = tmp_path_factory.mktemp("experiment")
    experiment = make_experiment(tree(tiny_folder, sentiment))
    return experiment, out, run_cells(experiment, out, backend="inline")
