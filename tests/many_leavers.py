"""End processes whose Gloo threads are late, and print their statuses (test_processes.py).

All run on one core, which another process keeps busy, and Gloo's threads run only when nobody else
wants to: so they still let go of the last exchange while the process ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from chainlora.training.processes import leave_processes

STATUSES = (0, 3) * 4


def exchange() -> None:
    numbers = torch.ones(1000)
    numbers.origin = "Python"  # so that letting go of it needs the interpreter
    distributed.all_reduce(numbers)


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    statuses = []
    for status in STATUSES:
        child = os.fork()
        if child == 0:
            end(status)  # which does not return
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    busy.kill()
    print(json.dumps(statuses))


def end(status: int) -> None:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    global mesh  # as those of shared models, which are never freed
    mesh = init_device_mesh("cpu", (1,))
    exchange()
    for thread in Path("/proc/self/task").iterdir():
        if "gloo_runloop" in (thread / "comm").read_text():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        exchange()
    print("done")
    leave_processes(status)


if __name__ == "__main__":
    main()
