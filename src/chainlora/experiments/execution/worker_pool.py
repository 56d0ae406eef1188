"""How many cells run at a time on this machine: as asked for, or as memory and cores allow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from chainlora.errors import ConfigError

Workers = int | Literal["auto"]
# of the memory that is free at the start; the rest is for the page cache and everybody else
_SHARE = 0.8


def check_workers(workers: Workers, backend: str) -> None:
    """Raise ConfigError for a wrong number of workers."""
    if workers == "auto" and backend == "ray":
        raise ConfigError(
            "`workers` must be a number with Ray (got 'auto'): it measures this machine, not a "
            "cluster"
        )
    if workers != "auto" and workers < 1:
        raise ConfigError(f"`workers` must be at least 1, or auto (got {workers})")


class WorkerPool:
    """The number of workers. "auto" starts with one cell and fits the others to its peak memory.

    With "auto", cells on a GPU get one worker for each GPU that CUDA_VISIBLE_DEVICES lists, as what
    a GPU has free is not known beforehand; cells on cores get one worker a core at most.
    """

    def __init__(
        self,
        workers: Workers,
        environment: Mapping[str, str] = os.environ,
        free_mb: float | None = None,
    ) -> None:
        self.environment = environment
        self.size = 1 if workers == "auto" else workers
        self.free_mb = (free_mb or _free_mb()) if workers == "auto" else None
        self.peak_mb = 0.0

    def learn(self, result: Mapping[str, Any]) -> None:
        """Take a cell's result into account."""
        if self.free_mb is None or not result.get("peak_rss_mb"):
            return
        self.peak_mb = max(self.peak_mb, result["peak_rss_mb"])
        threads = int(self.environment.get("OMP_NUM_THREADS") or 1)
        on_cores = result["hardware"]["device"] == "cpu"
        most = num_cores() // threads if on_cores else len(listed_gpus(self.environment))
        self.size = max(1, min(most, int(_SHARE * self.free_mb / self.peak_mb)))


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def listed_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names."""
    return [
        device
        for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if device.strip()
    ]


def worker_environment(slot: int, workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker's environment adds: its share of the threads, and of the GPUs listed."""
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, num_cores() // workers))
    added = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    devices = listed_gpus(environment)
    if len(devices) > 1:
        added["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return added


def _free_mb() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / 2**20
