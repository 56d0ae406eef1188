"""Train jobs one after another, in each of the processes that torchrun starts (test_processes.py,
test_sharing.py).

usage: many_processes.py JOBS, a JSON list of jobs: "config" (a file), "resume", "stop" (the step
after which all processes end as if killed), "kill" ([process, step]), "outcome" (where the first
process writes what it saw); or "command" (arguments of the command line); or "load" (a model folder
that all processes load together), "dtype" and "outcome", which each of them writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import Stop

from chainlora.cli.main import run as command
from chainlora.config.reading import load_config
from chainlora.errors import ChainLoRAError
from chainlora.models.loading import load_model, load_shards, open_folder
from chainlora.models.shards import gathered, local
from chainlora.training.processes import leave_processes
from chainlora.training.stages import train_run as train

RANK = int(os.environ["RANK"])


def run(job: dict[str, Any]) -> dict[str, Any]:
    outcome: dict[str, Any] = {}

    def listener(event: Any) -> None:
        if event.name == "step" and job.get("kill") == [RANK, event.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if event.name == "step" and event.step == job.get("stop"):
            raise Stop

    try:
        train(load_config(job["config"]), resume=job.get("resume", False), listener=listener)
    except Stop:
        pass
    except ChainLoRAError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome["processes"] = torch.distributed.get_world_size()
    return outcome


@torch.no_grad()
def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load a model whole and in shares; say how much is held, and whether it is the same model."""
    dtype, count = getattr(torch, job["dtype"]), torch.distributed.get_world_size()
    whole, _ = load_model(job["load"], dtype)
    shared = load_shards(open_folder(job["load"]), dtype, count, torch.device("cpu"))
    rows = {name: local(p) for name, p in shared.named_parameters()}
    theirs, ids = dict(whole.named_parameters()), torch.arange(3, 19)[None]
    buffers = dict(whole.named_buffers())
    return {
        "held": sum(row.numel() for row in rows.values()),
        "whole": sum(p.numel() for p in theirs.values()),
        "tensors": len(rows),
        "same": theirs.keys() == rows.keys()
        and all(torch.equal(gathered(p), theirs[n]) for n, p in shared.named_parameters())
        and all(torch.equal(buffer, buffers[n]) for n, buffer in shared.named_buffers()),
        "same_logits": torch.equal(whole(input_ids=ids).logits, shared(input_ids=ids).logits),
        "freed": all(type(p).__name__ == "DTensor" for p in shared.parameters()),
    }


def main() -> None:
    torch.set_num_threads(1)
    # torchrun sends it as soon as one process is killed; what the others say comes a little later.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "command" in job:
            command(job["command"])
            continue
        outcome = load(job) if "load" in job else run(job)
        if RANK == 0 or "kill" in job or "load" in job:
            Path(f"{job['outcome']}.{RANK}").write_text(json.dumps(outcome))
    leave_processes()


if __name__ == "__main__":
    main()
