"""Workers: how many cells run at a time, what each gets, and how long it will take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from conftest import write_rows

from chainlora.data.preparing import IN_MEMORY
from chainlora.errors import ConfigError
from chainlora_lab import run_cells
from chainlora_lab.worker import worker_environment
from lab.cases import tree


def test_threads_and_gpus_are_shared_out():
    assert worker_environment(0, 10**6, {})["OMP_NUM_THREADS"] == "1"
    assert worker_environment(0, 1, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert worker_environment(3, 4, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(1, 2, {"CUDA_VISIBLE_DEVICES": "0"})


@pytest.mark.slow  # 20,000 rows and more
def test_a_large_file_is_encoded_by_processes_of_a_worker(tiny_folder, tmp_path):
    """A worker reads its standard input in a thread. Processes that it forks to encode rows close
    theirs, and once waited for ever for the lock of that read."""
    rows = [{"prompt": f"good {k}", "completion": " film"} for k in range(IN_MEMORY + 1)]
    files = {"train": rows, "test": rows[:8]}
    keys = {"tasks": {"own": {"data": {"task": None}}}, "methods": ["lora"], "seeds": [0]}
    told = tree(tiny_folder, tmp_path, **keys, tune={}, curve_points=0)
    told["base"] |= {"train": {"batch_size": 2, "eval_at_knots": False}}
    told["base"]["data"] = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", found)) for name, found in files.items()
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(told))
    command = [sys.executable, "-m", "chainlora", "experiment", "run", file, "--output"]
    done = subprocess.run(
        [*command, tmp_path / "out"],
        env=os.environ | {"CHAINLORA_CACHE": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,  # seconds; some ten are enough on two cores
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 2


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
