"""What a child process measures about itself: time, processor time and memory at every step."""

from __future__ import annotations

import os
import resource
import statistics
import time
from typing import Any

STARTED = time.time()


def resident_mb() -> float:
    """Return the resident memory now, in MiB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    """Return the peak of resident memory so far, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Steps:
    """A stopwatch with a mark at the end of every optimizer step.

    The first step warms caches up on every side, so rates are taken from its end to the end of the
    last one; what happens between steps (loading data, logging) is inside.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.processor: list[float] = []
        self.memory: list[float] = []
        self.losses: list[float] = []
        self.first_step_after = 0.0

    def mark(self) -> None:
        """Note the end of a step."""
        if not self.times:
            self.first_step_after = time.time() - STARTED
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())
        self.memory.append(round(resident_mb(), 1))

    def result(self, num_rows: int) -> dict[str, Any]:
        """Return the measures; rows spread evenly over the steps."""
        num_steps = len(self.times)
        if num_steps < 2:
            raise ValueError(f"a rate needs two steps at least (got {num_steps}); take more rows")
        seconds = self.times[-1] - self.times[0]
        processor = self.processor[-1] - self.processor[0]
        gaps = [end - begin for begin, end in zip(self.times, self.times[1:], strict=False)]
        rows = num_rows * (num_steps - 1) / num_steps
        return {
            "rows_per_second": rows / seconds,
            "rows_per_processor_second": rows / processor,
            "seconds_per_step": statistics.median(gaps),
            "num_steps": num_steps,
            "seconds_to_first_step": self.first_step_after,
            "losses": [round(loss, 5) for loss in self.losses],
            "final_loss": statistics.mean(self.losses[-3:]),
            "memory_mb": self.memory,
        }
