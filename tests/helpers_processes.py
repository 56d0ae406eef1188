"""Runs of several processes: torchrun starts them, each does what a script beside this says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import links_of, records_of, settings
from helpers_data import pair_files

from chainlora.chain.live import SOFT_LINK_TOLERANCE
from chainlora.runs.addresses import open_run

CHAIN = {"ranks": [4, 4], "steps": [4, 3]}
TRAIN = {"lr": 1e-3, "batch_size": 8, "eval_every": 2, "save_every": 1}


def tree_of(keys: dict[str, Any], base: Path, rows: Path, output: Path, **chain: Any) -> Any:
    """Return the config of a short run with checkpoints; `keys` are sections over its own."""
    pairs = pair_files(rows) if keys.get("train", {}).get("loss") == "dpo" else {}
    sections = {"data": keys.get("data", {}) | pairs, "train": TRAIN | keys.get("train", {})}
    sections["chain"] = CHAIN | chain | keys.get("chain", {})
    return settings(base, rows, output, **sections)


def job(tree: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Write a config beside its output; return the job that trains it."""
    path = Path(f"{tree['output']}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return {"config": str(path), "outcome": f"{tree['output']}.json"} | keys


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


def assert_close_records(one: Path, two: Path) -> None:
    """The same events, each written once, with the same tokens and scores."""
    first, second = records_of(one), records_of(two)
    assert [r["event"] for r in first] == [r["event"] for r in second]
    for a, b in zip(first, second, strict=True):
        assert a.get("tokens") == b.get("tokens")
        for key in ("loss", "grad_norm", "accuracy", "em"):
            assert a.get(key) == pytest.approx(b.get(key), abs=5e-6)  # float32 sums


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
            assert wrong < 2 * SOFT_LINK_TOLERANCE * update.norm()  # each is stored to it


def assert_ended_by_one_sentence(folder: Path) -> None:
    """A process of the job `killed` was killed in step 3."""
    error = outcome(folder, "killed")["error"]
    assert error.startswith("TrainingError: the 2 processes of a run must go on together")
    assert open_run(folder / "killed").verify().draft.position.step in (2, 3)
