"""Workers: how many cells run at a time, what each gets, and how long it will take."""

from __future__ import annotations

import pytest

from chainlora.errors import ConfigError
from chainlora_lab import run_cells
from chainlora_lab.worker import worker_environment


def test_threads_and_gpus_are_shared_out():
    assert worker_environment(0, 10**6, {})["OMP_NUM_THREADS"] == "1"
    assert worker_environment(0, 1, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert worker_environment(3, 4, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(1, 2, {"CUDA_VISIBLE_DEVICES": "0"})


def test_what_is_no_number_of_workers(small, tmp_path):
    experiment = small()
    with pytest.raises(ConfigError, match=r"`workers` must be at least 1 \(got 0\)"):
        run_cells(experiment, tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match=r"`inline` runs one cell at a time \(got 2 workers\)"):
        run_cells(experiment, tmp_path / "out", workers=2, backend="inline")
    assert not (tmp_path / "out").exists()


def test_workers_share_the_cells(small, tmp_path):
    most = []

    def listen(record):
        if record["event"] == "poll":
            most.append(len(record["running"]))

    keys = {"methods": ["lora"], "seeds": [0, 1], "tune": {}}
    experiment = small(**keys)
    outcome = run_cells(experiment, tmp_path, workers=2, listener=listen)
    assert (outcome.num_run, outcome.failed) == (2, {})
    assert max(most) == 2
