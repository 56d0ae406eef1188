"""Runs of several processes: torchrun starts them, each does what a script beside this says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import links_of

from chainlora.runs.addresses import open_run


def launch(
    count: int,
    folder: Path,
    jobs: list[dict[str, Any]],
    *,
    script: str = "many_processes.py",
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run jobs in so many processes; return torchrun's outcome."""
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(Path(__file__).with_name(script)), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """Return what the first process saw in a job."""
    return json.loads((folder / f"{name}.json.0").read_text())


def assert_close_links(one: Path, two: Path) -> None:
    """The same sums in another order. Adam divides by the gradient's size, so rounding in a tiny
    gradient moves a weight by a small share of the rate, 1e-3."""
    first, second = links_of(one), links_of(two)
    assert len(first) == len(second) >= 2
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)


def assert_close_updates(one: Path, two: Path) -> None:
    """Factors of links with soft knots come from a singular value decomposition: their products
    are compared."""
    for a, b in zip(open_run(one).links(2), open_run(two).links(2), strict=True):
        for name in a.factors:
            update = a.delta_weight(name)
            wrong = (update - b.delta_weight(name)).norm()
            assert wrong < 2e-3 * update.norm()  # each is stored to 1e-3
