"""What each process of `run.py` does: jobs one after another.

usage (by torchrun): child.py JOBS, a JSON list of jobs: "config" (a file), "resume", "stop" (the
step after which all processes end as if killed), "traffic" (count bytes as well); or "hold" (the
folder of a model, to be loaded, tuned for a step and tied). Each process writes what it saw to
"outcome", with ".RANK" added.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.chain import Chain
from chainlora.config.reading import load_config
from chainlora.config.schema import LinkConfig
from chainlora.models.checkpoint import Stored
from chainlora.models.loading import load_model, load_shards
from chainlora.training.processes import leave_processes
from chainlora.training.stages import train_run as train

RANK = int(os.environ["RANK"])
# what FSDP2 calls: by another name since torch 2.13
GATHER = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(distributed, n))


class Stop(BaseException):
    """Ends a job where a kill would."""


class Memory:
    """Resident memory of this process by phases of a run, sampled, in bytes above the start."""

    def __init__(self) -> None:
        self.start = resident()
        self.phase = "loading"
        self.peaks: dict[str, int] = {}
        self.levels: dict[str, int] = {}
        self._ended = False
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended:
            phase = self.phase
            self.peaks[phase] = max(self.peaks.get(phase, 0), resident() - self.start)
            time.sleep(0.002)

    def enter(self, phase: str) -> None:
        """Note what is held at the end of a phase, and begin another one."""
        self.levels[self.phase] = resident() - self.start
        self.phase = phase

    def end(self) -> dict[str, Any]:
        """Return levels and peaks by phase."""
        self.enter("end")
        self._ended = True
        self._thread.join()
        return {"levels": self.levels, "peaks": self.peaks}


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Traffic:
    """Bytes that this process exchanges in a step, and reads and writes at a knot."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(("summed", "gathered", "read", "written"), 0)
        self.last: dict[str, int] = {}

        def written(args: Sequence[Any], out: Any) -> int:
            return args[1].numel() * args[0].itemsize

        self._restore = [
            self._count(distributed, "all_reduce", "summed", lambda args, out: args[0].nbytes),
            self._count(distributed, GATHER, "gathered", lambda args, out: args[0].nbytes),
            self._count(Stored, "read", "read", lambda args, out: out.nbytes),
            self._count(BaseWeights, "write", "written", written),
        ]

    def _count(self, owner: Any, name: str, kind: str, amount: Callable[..., int]) -> Any:
        before, plain = vars(owner)[name], getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = args if args else (kwargs["output_tensor"], kwargs["input_tensor"])
            out = plain(*args, **kwargs)
            self.now[kind] += amount(given, out)
            return out

        setattr(owner, name, staticmethod(counted) if isinstance(before, staticmethod) else counted)
        return owner, name, before

    def note(self, *kinds: str) -> None:
        """Keep what was counted since the last event."""
        self.last |= {kind: self.now[kind] for kind in kinds}
        self.now = dict.fromkeys(self.now, 0)

    def end(self) -> dict[str, int]:
        """Stop counting; return the bytes of the last step and of the last knot."""
        for owner, name, before in self._restore:
            setattr(owner, name, before)
        return self.last


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train a config and return losses, scores of rows, knots and traffic."""
    traffic = Traffic() if job.get("traffic") else None
    told: dict[str, Any] = {"losses": [], "scores": [], "knots": [], "notes": [], "seconds": []}
    config = load_config(job["config"])

    def listener(event: Any) -> None:
        if event.name == "plan":
            told["notes"] = event.notes
            if traffic is not None:
                traffic.note()
        elif event.name == "step":
            if traffic is not None:
                traffic.note("summed", "gathered")
            told["losses"].append(event.loss)
            told["seconds"].append(event.seconds)
            if event.step == job.get("stop"):
                raise Stop
        elif event.name == "knot":
            told["knots"].append(event.function_change)
            if traffic is not None:
                traffic.note("read", "written")
        elif event.name == "scored":
            told["scores"] = [row["scores"] for row in event.predictions]

    try:
        train(config, resume=job.get("resume", False), listener=listener)
    except Stop:
        told["stopped"] = True
    return told | {"traffic": traffic and traffic.end()}


def hold(job: dict[str, Any]) -> dict[str, Any]:
    """Load a model, shared where there are several processes, tune a link for a step and tie it;
    return what this process holds."""
    folder, count = Path(job["hold"]), int(os.environ["WORLD_SIZE"])
    memory = Memory()
    if count > 1:
        distributed.init_process_group("gloo")
        model, _ = load_shards(folder, torch.bfloat16, count, torch.device("cpu"))
    else:
        model, _ = load_model(folder, torch.bfloat16)
        model.requires_grad_(False)
    memory.enter("extending")
    chain = Chain(model, checkpoint=folder)
    chain.extend(LinkConfig(rank=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(chain.parameters())
    memory.enter("step")
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    memory.enter("knot")
    chain.tie()
    memory.enter("after")
    return {"memory": memory.end()}


def main() -> None:
    """Do all jobs."""
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        told = hold(job) if "hold" in job else run(job)
        Path(f"{job['outcome']}.{RANK}").write_text(json.dumps(told))
    leave_processes()


if __name__ == "__main__":
    main()
