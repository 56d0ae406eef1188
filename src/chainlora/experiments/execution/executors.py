"""Where cells run: as processes of this machine, in this process, or on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chainlora.errors import ConfigError
from chainlora.experiments.design.expansion import Cell
from chainlora.experiments.execution.cells import ERROR, RESULT, work_on
from chainlora.experiments.execution.worker_pool import (
    WorkerPool,
    Workers,
    check_workers,
    worker_environment,
)

_POLL_SECONDS = 0.2

Work = Sequence[tuple[Cell, Path]]
Poll = Callable[[Sequence[Cell]], None]
Ended = Iterator[tuple[Cell, str | None]]
Executor = Callable[[Work, Poll], Ended]


def executor(backend: str, workers: Workers) -> Executor:
    """Return what runs cells and yields each with its error, or None, as it ends.

    Raises ConfigError: unknown backend, wrong number of workers.
    """
    check_workers(workers, backend)
    if backend == "local":
        pool = WorkerPool(workers)
        return lambda work, poll: run_local(work, poll, pool)
    if backend == "inline":
        return run_inline
    if backend == "ray":
        from chainlora.experiments.execution.ray_backend import run_on_ray

        return lambda work, poll: run_on_ray(work, poll, int(workers))
    raise ConfigError(f"`backend` must be local, inline or ray (got {backend!r})")


def run_inline(work: Work, poll: Poll) -> Ended:
    """Run cells one by one in this process."""
    for cell, directory in work:
        poll([cell])
        yield cell, None if work_on(directory) == 0 else _error(directory, 1)


def run_local(work: Work, poll: Poll, pool: WorkerPool) -> Ended:
    """Run cells as processes of this machine, as many at a time as the pool has workers."""
    waiting = list(work)
    running: dict[int, tuple[Cell, Path, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < pool.size:
                cell, directory = waiting.pop(0)
                slot = min(set(range(pool.size)) - running.keys())
                running[slot] = (cell, directory, _start(directory, slot, pool.size))
            ended = [
                slot for slot, (_, _, process) in running.items() if process.poll() is not None
            ]
            for slot in ended:
                cell, directory, process = running.pop(slot)
                error = _error(directory, process.returncode)
                if error is None:
                    pool.learn(json.loads((directory / RESULT).read_text(encoding="utf-8")))
                yield cell, error
            if not ended:
                poll([cell for cell, _, _ in running.values()])
                time.sleep(_POLL_SECONDS)
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.wait()


def _start(directory: Path, slot: int, workers: int) -> subprocess.Popen[bytes]:
    module = "chainlora.experiments.execution.worker"
    with (directory / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(directory), "--watch"],
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
