"""One measurement of run.py, in a process of its own; prints a line of JSON."""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = 100
# Two rows: with eight, the logits over 49,152 words are a block of 78 MB that the C library now and
# then returns to the system at every step, which makes two kinds of runs, 10 % apart.
BATCH = 2
READ_BATCHES = 5000  # of 8 random rows


def train_some_steps(path: Path, model: Path) -> dict[str, Any]:
    """Time to the first step, and of a step after it, through what every version has."""
    import chainlora
    from chainlora import make_config

    config = make_config(
        {
            "model": str(model),
            "data": {"train": str(path), "format": "text"},
            "chain": {"ranks": [2], "steps": [STEPS], "target_modules": ["q_proj", "v_proj"]},
            "train": {"batch_size": BATCH, "save_every": None},
        }
    )
    times: list[float] = []
    processor: list[float] = []
    resident: list[float] = []

    def listen(record: Any) -> None:
        if record["event"] == "step":
            times.append(time.perf_counter())
            processor.append(time.process_time())
            resident.append(resident_mb())

    train = chainlora.train  # the import that counts
    start = time.perf_counter()
    train(config, listener=listen)
    return {
        "first_step_s": round(times[0] - start, 3),
        "resident_mb": round(resident[-1]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "step_ms": typical_ms(times),
        "step_cpu_ms": typical_ms(processor),
        "cpu_s": round(cpu_s(), 2),
    }


def typical_ms(times: list[float]) -> float:
    """Return the median of what lies between, the first quarter left out."""
    later = times[len(times) // 4 :]
    return round(1000 * statistics.median(b - a for a, b in pairwise(later)), 2)


def tokenise(path: Path, model: Path) -> dict[str, Any]:
    """Time to build or find the rows, memory meanwhile, and time to read rows at random."""
    from transformers import AutoTokenizer

    from chainlora.data.encoding import Options
    from chainlora.data.preparing import make_rows
    from chainlora.data.sources import FileSource

    tokenizer = AutoTokenizer.from_pretrained(model)
    before, start = cpu_s(), time.perf_counter()
    rows = make_rows(FileSource(path), tokenizer, "text", Options())
    made, used = time.perf_counter(), cpu_s()
    draw = random.Random(0)
    first = [rows[draw.randrange(len(rows))] for _ in range(BATCH)]
    done = time.perf_counter()
    for _ in range(READ_BATCHES):
        first = [rows[draw.randrange(len(rows))] for _ in range(8)]
    read = time.perf_counter() - done
    return {
        "rows_s": round(made - start, 3),
        "rows_cpu_s": round(used - before, 3),
        "first_batch_ms": round(1000 * (done - made), 3),
        "batch_us": round(1e6 * read / READ_BATCHES, 1),
        "resident_mb": round(resident_mb()),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "digest": rows.summary.digest,
        "tokens": sum(len(ids) for example in first for ids in example.sequences),
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    measure = {"train": train_some_steps, "tokenise": tokenise}
    what, rows, folder = sys.argv[1:]
    print(json.dumps(measure[what](Path(rows), Path(folder))))
