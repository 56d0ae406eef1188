"""Train jobs one after another, in each of the processes that torchrun starts (test_processes.py).

usage: many_processes.py JOBS, a JSON list of jobs: "config" (a file), "resume", "stop" (the step
after which all processes end as if killed), "kill" ([process, step]), "outcome" (where the first
process writes what it saw); or "command" (arguments of the command line).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from chainlora.cli.main import run as command
from chainlora.config.loading import load_config
from chainlora.errors import ChainLoRAError
from chainlora.training.loop import train

RANK = int(os.environ["RANK"])


class Stop(BaseException):
    """Ends a job where a kill would."""


def run(job: dict[str, Any]) -> dict[str, Any]:
    losses: list[float] = []
    evaluations: list[dict[str, Any]] = []

    def listener(event: Any) -> None:
        if event.name == "eval":
            evaluations.append(event.record())
        if event.name != "step":
            return
        losses.append(event.loss)
        if job.get("kill") == [RANK, event.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if event.step == job.get("stop"):
            raise Stop

    outcome: dict[str, Any] = {"losses": losses, "evaluations": evaluations}
    try:
        outcome["result"] = train(
            load_config(job["config"]), resume=job.get("resume", False), listener=listener
        )
    except Stop:
        pass
    except ChainLoRAError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome["processes"] = torch.distributed.get_world_size()
    return outcome


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "command" in job:
            command(job["command"])
            continue
        outcome = run(job)
        if RANK == 0 or "kill" in job:
            Path(f"{job['outcome']}.{RANK}").write_text(json.dumps(outcome, default=str))


if __name__ == "__main__":
    main()
