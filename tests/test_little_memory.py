"""Where memory runs out, one sentence says what to lower, whoever finds it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_rows

CHILD = """
import resource, sys
from pathlib import Path
import chainlora.training.loop, accelerate, peft, torch.distributed.fsdp
from chainlora.cli.main import run
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_batch_beyond_memory_ends_with_what_to_lower(tiny_folder, tmp_path):
    draw = random.Random(0)  # rows without a common beginning, which would be computed once
    words = ["the", "cat", "sat", "on", "a", "mat", "good", "bad", "red", "birds", "fly"]
    rows = [{"text": " ".join(draw.choices(words, k=30))} for _ in range(3000)]
    tree = {
        "model": str(tiny_folder),
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", rows))},
        "chain": {"ranks": [2], "steps": [1]},
        "train": {"batch_size": 3000},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    call = [sys.executable, "-c", CHILD, "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(call, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert said.startswith("chainlora: error: the work must fit into memory (got none left); lower")
    assert "train.batch_size" in said
