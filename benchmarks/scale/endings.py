"""How often a process aborts at its end, after its work: ``python benchmarks/scale/endings.py``.

Each process exchanges a few numbers over Gloo and ends: by `leave_processes`, after
`destroy_process_group`, or with nothing done about it. To make a rare case common, all run on one
core beside a busy process, and Gloo's threads run only when nobody else wants to, so that they let
go of the last exchange while the process ends (docs/decisions/0028). Linux; on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from chainlora.training.processes import leave_processes

WAYS = ("nothing", "destroy_process_group", "leave_processes")
KEPT = []  # as caches of torch keep the mesh of a shared model


def main() -> None:
    """Count the exit statuses of each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=25, help="of each way")
    count = parser.parse_args().processes
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    for way in WAYS:
        statuses: Counter[int] = Counter()
        for _ in range(count):
            child = os.fork()
            if child == 0:
                exchange_and_end(way)
                return
            statuses[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
        aborted = count - statuses[0]
        print(f"{way}: {aborted} of {count} aborted (statuses {dict(statuses)})", flush=True)
    busy.kill()


def exchange_and_end(way: str) -> None:
    """Be one of the processes."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    KEPT.append(init_device_mesh("cpu", (1,)))
    KEPT.append(KEPT)
    exchange()
    for thread in Path("/proc/self/task").iterdir():
        if "gloo_runloop" in (thread / "comm").read_text():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        exchange()
    if way == "destroy_process_group":
        distributed.destroy_process_group()
    if way == "leave_processes":
        leave_processes()


def exchange() -> None:
    """Sum a tensor over all processes, one that Python must let go of."""
    numbers = torch.ones(1000)
    numbers.origin = "Python"
    distributed.all_reduce(numbers)


if __name__ == "__main__":
    main()
