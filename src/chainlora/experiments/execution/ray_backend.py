"""The same cells on a Ray cluster (extra `ray`): Ray schedules, a cell is computed as elsewhere.

The driver sends a config and writes what comes back, so results need no shared file system; model
and rows must be found on every node, under the same path or on the Hub. A cell that is lost starts
over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from chainlora.config.loading import make_config
from chainlora.errors import ConfigError
from chainlora.experiments.design.expansion import Cell
from chainlora.experiments.execution.cells import CONFIG, ERROR, compute, write_result
from chainlora.experiments.execution.rows import Rows, write_rows
from chainlora.files import write_text


def compute_remotely(config: str) -> tuple[dict[str, Any], Rows]:
    """Train a config (YAML text) in a temporary folder; return its fields and its rows' scores."""
    with tempfile.TemporaryDirectory() as folder:
        return compute(make_config(yaml.safe_load(config)), Path(folder) / "run")


def run_on_ray(
    work: Sequence[tuple[Cell, Path]],
    poll: Callable[[Sequence[Cell]], None],
    workers: int,
) -> Iterator[tuple[Cell, str | None]]:
    """Hand cells to Ray, `workers` at a time; yield each with its error, or None, as it ends.

    Each asks for an equal share of the cluster's cores and GPUs: at most one node's cores and one
    GPU.

    Raises ConfigError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "`backend: ray` needs Ray (got none installed); pip install 'chainlora[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(address=None, log_to_driver=False)
    cluster = ray.cluster_resources()
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    remote = ray.remote(
        max_retries=2,
        num_cpus=max(1, int(min(cluster.get("CPU", workers) // workers, largest))),
        num_gpus=min(1.0, cluster.get("GPU", 0) / workers),
    )(compute_remotely)
    waiting, running = list(work), dict[Any, tuple[Cell, Path]]()
    while waiting or running:
        while waiting and len(running) < workers:
            cell, directory = waiting.pop(0)
            config = (directory / CONFIG).read_text(encoding="utf-8")
            running[remote.remote(config)] = (cell, directory)
        done, _ = ray.wait(list(running), timeout=1.0)
        poll([cell for cell, _ in running.values()])
        for reference in done:
            cell, directory = running.pop(reference)
            yield cell, _collect(ray, reference, directory)


def _collect(ray: Any, reference: Any, directory: Path) -> str | None:
    try:
        result, rows = ray.get(reference)
    except Exception as error:  # whatever a cell raises fails that cell alone
        message = " ".join(str(getattr(error, "cause", None) or error).split())[:2000]
        write_text(directory / ERROR, message + "\n")
        return message
    write_rows(directory, rows)
    write_result(directory, result)
    return None
