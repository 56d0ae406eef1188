"""Runs of two and three stages."""

from __future__ import annotations

import pytest

from chainlora.config.staging import make_stages
from chainlora.training.stages import train_stages
from stages.cases import copied, stage_of, two_stages


@pytest.fixture
def config(tiny_folder, sentiment, tmp_path) -> dict:
    """A config of two stages, whose run will be tmp_path/run."""
    return two_stages(tiny_folder, sentiment, tmp_path)


@pytest.fixture(scope="session")
def trained_once(tiny_folder, sentiment, tmp_path_factory) -> dict[str, dict]:
    """The config of two stages, and of three: facts (links 0 to 2), style (3, 4), law (5, 6); the
    runs are trained."""
    configs = {}
    for name in ("two", "three"):
        config = two_stages(tiny_folder, sentiment, tmp_path_factory.mktemp(name))
        if name == "three":
            law = stage_of(config, "style") | {"name": "law"}
            law["data"] = stage_of(config, "facts")["data"] | {"num_train": 20}
            config["stages"].append(law)
            config["stages"][1]["train"] = {"eval_every": 1, "keep_best": True}
        train_stages(make_stages(config))
        configs[name] = config
    return configs


@pytest.fixture
def two(trained_once, tmp_path) -> dict:
    """The config of two stages and, in tmp_path/run, a copy of its trained run."""
    return copied(trained_once["two"], tmp_path)


@pytest.fixture
def three(trained_once, tmp_path) -> dict:
    """The config of three stages and, in tmp_path/run, a copy of its trained run."""
    return copied(trained_once["three"], tmp_path)
