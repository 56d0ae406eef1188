"""The GPU suite runs on a CPU too, at tiny size: laws hold, and no part fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "run.py"


@pytest.mark.slow
def test_the_gpu_suite_runs_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RUN), "--tiny", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("results-*.json")
    parts = json.loads(results.read_text())["parts"]
    assert [name for name, found in parts.items() if "failed" in found] == []
    laws = {name: found["wrong"] for name, found in parts.items() if name.startswith("laws")}
    assert len(laws) == 6
    assert not any(laws.values())
    # equal operations on a CPU; on a GPU sums run in another order
    assert parts["training as on a CPU"]["largest relative difference of a loss"] < 1e-4
    assert parts["combining as on a CPU"]["largest relative difference of an update"] == 0
    assert parts["combining tiny Llama"]["combination seconds"] > 0
    assert parts["speed tiny Llama"]["times as fast"] > 0
    assert list(tmp_path.glob("results-*.md"))
