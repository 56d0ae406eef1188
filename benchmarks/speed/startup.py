"""Time to import and to print help, against what peers take to import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

COMMANDS = {
    "python": "pass",
    "import chainlora": "import chainlora",
    "chainlora --help": "from chainlora.cli import run; run(['--help'])",
    "import torch": "import torch",
    "import peft": "import peft",
    "import trl.SFTTrainer": "from trl import SFTTrainer",
}
TRIES = 5  # after one that warms the file cache


def run_startup(bench: Any) -> None:
    """Measure every command and record it."""
    for label, code in COMMANDS.items():
        seconds = [_once(code, bench.environment) for _ in range(TRIES + 1)][1:]
        measures = {"seconds": statistics.median(seconds), "all_seconds": seconds}
        ours = {"measure": "seconds", "ours": label == "import chainlora", "goals": {}}
        bench.record("startup", label, 0, measures | ours)


def _once(code: str, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    words = [sys.executable, "-c", code]
    subprocess.run(words, env=environment, capture_output=True, check=False)
    return time.perf_counter() - began
