"""Where cells run: as processes of this machine, in this process, or on Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError
from .cells import ERROR, RESULT, work_on
from .expansion import Cell

_POLL_SECONDS = 0.2

Work = Sequence[tuple[Cell, Path]]
Executor = Callable[[Work, Callable[[Sequence[Cell]], None]], Iterator[tuple[Cell, str | None]]]


def executor(backend: str, workers: int) -> Executor:
    if backend == "local":
        return lambda work, poll: run_local(work, poll, workers)
    if backend == "inline":
        return run_inline
    if backend == "ray":
        from .ray_backend import run_on_ray

        return lambda work, poll: run_on_ray(work, poll, workers)
    raise ConfigError(f"`backend` must be local, inline or ray (got {backend!r})")


def run_inline(work: Work, poll: Callable[[Sequence[Cell]], None]) -> Iterator[tuple[Cell, str | None]]:
    """Run cells one by one in this process; yield each with its error, or None, as it ends."""
    for cell, directory in work:
        poll([cell])
        yield cell, None if work_on(directory) == 0 else _error(directory, 1)


def run_local(
    work: Work, poll: Callable[[Sequence[Cell]], None], workers: int
) -> Iterator[tuple[Cell, str | None]]:
    """Run cells as processes here, `workers` at a time; yield each with its error, or None, as it ends."""
    waiting, slots = list(work), list(range(workers))
    running: dict[int, tuple[Cell, Path, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                cell, directory = waiting.pop(0)
                slot = slots.pop(0)
                running[slot] = (cell, directory, _start(directory, slot, workers))
            ended = [slot for slot, (_, _, process) in running.items() if process.poll() is not None]
            for slot in ended:
                cell, directory, process = running.pop(slot)
                slots.append(slot)
                yield cell, _error(directory, process.returncode)
            if not ended:
                poll([cell for cell, _, _ in running.values()])
                time.sleep(_POLL_SECONDS)
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.wait()


def _start(directory: Path, slot: int, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chainlora.experiments.worker", str(directory), "--watch"]
    with (directory / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | worker_environment(slot, workers, os.environ),
        )


def worker_environment(slot: int, workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker's environment adds: its share of the threads, and of the GPUs listed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    added = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    devices = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if len(devices) > 1:
        added["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return added


def _error(directory: Path, status: int) -> str | None:
    if (directory / RESULT).is_file():
        return None
    try:
        return (directory / ERROR).read_text(encoding="utf-8").strip()
    except OSError:
        return f"its process ended with status {status} and no result; see {directory / 'log.txt'}"
