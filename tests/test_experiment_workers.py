"""Workers: how many cells run at a time, what each gets, and how long it will take."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from experiment_cases import tree

from chainlora.data.preparing import IN_MEMORY
from chainlora.errors import ConfigError
from chainlora.experiments import make_experiment, run_cells
from chainlora.experiments.execution.progress import time_left
from chainlora.experiments.execution.worker_pool import WorkerPool, worker_environment


def test_threads_and_gpus_are_shared_out():
    assert worker_environment(0, 10**6, {})["OMP_NUM_THREADS"] == "1"
    assert worker_environment(0, 1, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert worker_environment(3, 4, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(1, 2, {"CUDA_VISIBLE_DEVICES": "0"})


def test_auto_workers_are_what_memory_and_cores_leave_room_for(monkeypatch):
    monkeypatch.setattr("chainlora.experiments.execution.worker_pool.num_cores", lambda: 8)
    cell = {"peak_rss_mb": 1500.0, "hardware": {"device": "cpu"}}

    def workers(*cells, count="auto", **environment):
        found = WorkerPool(count, environment, free_mb=10_000)
        for each in cells:
            found.learn(each)
        return found.size

    assert workers() == 1  # nothing known yet
    assert workers(cell) == 5  # of 8000 MB, four fifths of what is free
    assert (
        workers(cell, cell | {"peak_rss_mb": 2500.0})
        == workers(cell | {"peak_rss_mb": 2500.0}, cell)
        == 3
    )
    assert workers(cell | {"peak_rss_mb": 100.0}) == 8
    assert workers(cell | {"peak_rss_mb": 100.0}, OMP_NUM_THREADS="4") == 2
    assert workers(cell | {"peak_rss_mb": 50_000.0}) == 1
    assert workers(cell | {"status": "diverged", "peak_rss_mb": None}) == 1
    gpu = cell | {"hardware": {"device": "cuda"}}
    assert (workers(gpu), workers(gpu, CUDA_VISIBLE_DEVICES="0,1,2")) == (1, 3)
    assert workers(cell, count=2) == 2


def test_auto_starts_with_one_cell(tiny_folder, sentiment, tmp_path, monkeypatch):
    """One cell alone; once it has shown its memory, as many as there are cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("chainlora.experiments.execution.worker_pool.num_cores", lambda: 3)
    numbers, ended = {True: set(), False: set()}, []

    def listen(record):
        if record["event"] == "cell":
            ended.append(record["cell"])
        if record["event"] == "poll":
            numbers[not ended].add(len(record["running"]))

    experiment = make_experiment(
        tree(tiny_folder, sentiment, methods=["lora"], seeds=[0, 1, 2, 3], tune={})
    )
    outcome = run_cells(experiment, tmp_path, workers="auto", listener=listen)
    assert (outcome.num_run, outcome.failed) == (4, {})
    assert numbers[True] == {1}
    assert max(numbers[False]) == 3


def test_a_large_file_is_encoded_by_processes_of_a_worker(tiny_folder, tmp_path):
    """A worker reads its standard input in a thread. Processes that it forks to encode rows close
    theirs, and once waited for ever for the lock of that read."""
    rows = [{"prompt": f"good {k}", "completion": " film"} for k in range(IN_MEMORY + 1)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = rows[:8]
    file = tmp_path / "experiment.yaml"
    base = {
        "model": str(tiny_folder),
        "recipe": {"rank": 2, "steps": 1, "scaling": 2},
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")},
        "chain": {"target_modules": ["q_proj"]},
        "train": {"batch_size": 2, "eval_at_knots": False},
    }
    small = {
        "name": "large",
        "base": base,
        "tasks": {"own": {"data": {"task": None}}},
        "methods": ["lora"],
        "seeds": [0],
    }
    file.write_text(yaml.safe_dump(small | {"curve_points": 0}))
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


@pytest.mark.parametrize(
    ("workers", "backend", "message"),
    [
        (0, "local", "`workers` must be at least 1, or auto .got 0."),
        ("auto", "ray", "must be a number with Ray"),
    ],
)
def test_what_is_no_number_of_workers(tiny_folder, sentiment, tmp_path, workers, backend, message):
    experiment = make_experiment(tree(tiny_folder, sentiment))
    with pytest.raises(ConfigError, match=message):
        run_cells(experiment, tmp_path / "out", workers=workers, backend=backend)
    assert not (tmp_path / "out").exists()


def test_time_left_is_by_task_and_by_workers():
    assert time_left([], [("a", 1.0)], 0, 1) is None
    assert (
        time_left([("a", 10.0), ("b", 30.0)], [("a", 0.5), ("b", 1.0), ("c", 1.0)], 2, 2)
        == (5 + 30 + 20 + 40) / 2
    )
