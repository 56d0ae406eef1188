"""Where cells run: each in a process of its own, some at a time, or one by one in this process.

A process a cell costs some seconds of start-up and buys a true peak memory, and a crash that takes
nothing along: the pool of `concurrent.futures` fails as a whole where one process is killed for its
memory, and leaves its processes behind where the runner is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from chainlora.errors import ConfigError
from chainlora.experiments.expansion import Cell
from chainlora.experiments.worker import ERROR, RESULT, work_on

_POLL_SECONDS = 0.2

Work = Sequence[tuple[Cell, Path]]
Poll = Callable[[Sequence[Cell]], None]
Ended = Iterator[tuple[Cell, str | None]]


def check_workers(workers: int, backend: str) -> None:
    """Raise ConfigError for a wrong number of workers, or an unknown backend."""
    if workers < 1:
        raise ConfigError(f"`workers` must be at least 1 (got {workers})")
    if backend not in ("local", "inline"):
        raise ConfigError(f"`backend` must be local or inline (got {backend!r})")


def run_all(work: Work, poll: Poll, workers: int, backend: str) -> Ended:
    """Run cells and yield each with its error, or None, as it ends."""
    return run_inline(work, poll) if backend == "inline" else run_processes(work, poll, workers)


def run_inline(work: Work, poll: Poll) -> Ended:
    """Run cells one by one in this process."""
    for cell, directory in work:
        poll([cell])
        yield cell, None if work_on(directory) == 0 else _error(directory, 1)


def run_processes(work: Work, poll: Poll, workers: int) -> Ended:
    """Run cells as processes of this machine, `workers` at a time."""
    waiting = list(work)
    running: dict[int, tuple[Cell, Path, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for slot in sorted(set(range(workers)) - running.keys())[: len(waiting)]:
                cell, directory = waiting.pop(0)
                running[slot] = (cell, directory, _start(directory, slot, workers))
            ended = [slot for slot, (*_, process) in running.items() if process.poll() is not None]
            for slot in ended:
                cell, directory, process = running.pop(slot)
                yield cell, _error(directory, process.returncode)
            if not ended:
                poll([cell for cell, *_ in running.values()])
                time.sleep(_POLL_SECONDS)
    finally:
        for *_, process in running.values():
            process.terminate()
            process.wait()


def _start(directory: Path, slot: int, workers: int) -> subprocess.Popen[bytes]:
    module = "chainlora.experiments.worker"
    with (directory / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(directory)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | worker_environment(slot, workers, os.environ),
        )


def _error(directory: Path, status: int) -> str | None:
    if (directory / RESULT).is_file():
        return None
    try:
        return (directory / ERROR).read_text(encoding="utf-8").strip()
    except OSError:
        return f"its process ended with status {status} and no result; see {directory / 'log.txt'}"


def worker_environment(slot: int, workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker's environment adds: its share of the threads, and of the GPUs listed."""
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, _num_cores() // workers))
    added = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    listed = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = [device for device in listed if device.strip()]
    if len(devices) > 1:
        added["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return added


def _num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
