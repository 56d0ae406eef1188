"""One measurement of run.py, in a process of its own; prints a line of JSON."""

from __future__ import annotations

import json
import os
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


def tokenise_ours(path: Path, model: Path) -> dict[str, Any]:
    from chainlora.data.encoding import Options
    from chainlora.data.preparing import make_rows
    from chainlora.data.sources import FileSource

    tokenizer = load_tokenizer(model)
    before, start = cpu_s(), time.perf_counter()
    rows = make_rows(FileSource(path), tokenizer, "text", Options())
    return {
        "seconds": time.perf_counter() - start,
        "cpu_s": cpu_s() - before,
        "tokens": int(rows.lengths.sum()),
    }


def tokenise_theirs(path: Path, model: Path) -> dict[str, Any]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    tokenizer = load_tokenizer(model)
    end = [tokenizer.eos_token_id]

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [ids + end for ids in tokenizer(batch["text"])["input_ids"]]}

    before, start = cpu_s(), time.perf_counter()
    table = load_dataset("json", data_files=str(path), split="train")
    middle = time.perf_counter()
    table = table.map(
        encode,
        batched=True,
        num_proc=len(os.sched_getaffinity(0)),
        remove_columns=table.column_names,
    )
    done = time.perf_counter()
    tokens = sum(len(ids) for ids in table["input_ids"])
    return {
        "seconds": done - start,
        "map_s": done - middle,
        "cpu_s": cpu_s() - before,
        "tokens": tokens,
    }


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    measure = {"train": train_some_steps, "ours": tokenise_ours, "datasets": tokenise_theirs}
    what, rows, folder = sys.argv[1:]
    print(json.dumps(measure[what](Path(rows), Path(folder))))
