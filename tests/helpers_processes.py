"""Runs of several processes: torchrun starts them, each does what a script beside this says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


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
