"""Lives of a run: each in a forked process, with a fault, to be resumed and compared.

Everything is imported once; a life then costs no more than the run itself.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from injection import Injection, describe

from chainlora import make_config, train
from chainlora.config.schema import RunConfig
from chainlora.errors import ChainLoRAError
from chainlora.training.interrupts import interruptible

# Every feature that has state on disk.
EVERYTHING = {
    "chain": {
        "ranks": [2, 2, 2],
        "alpha": 4,
        "steps": [2, 2, 1],
        "target_modules": ["q_proj", "v_proj"],
        "dropout": 0.1,
        "init": "gradient",
        "init_batches": 1,
    },
    "train": {
        "lr": 1e-2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "dtype": "bfloat16",
        "optimizer_reset": "prune",
        "prune_fraction": 0.5,
        "keep_best": True,
        "select_metric": "loss",
        "eval_every": 1,
        "save_every": 1,
    },
}


@dataclass
class End:
    """How a life ended: its status (-9: killed; 0: done; 1: our error; 2: any other), and why."""

    status: int
    message: str
    operations: list[str]


def config_in(folder: Path, base: Path, data: Path, **sections: Any) -> RunConfig:
    """Return the config of a small run with everything on, its output in `folder`/run."""
    tree: dict[str, Any] = {
        "model": str(base),
        "data": {
            "task": str(data / "task.yaml"),
            "train": str(data / "train.jsonl"),
            "validation": str(data / "validation.jsonl"),
            "num_train": 12,
            "num_validation": 4,
        },
        "output": str(folder / "run"),
    }
    for name, keys in EVERYTHING.items():
        tree[name] = keys | sections.get(name, {})
    return make_config(tree)


def live(work: Callable[[], object], injection: Injection | None = None) -> End:
    """Do some work in a process of its own, with a fault, and say how it ended."""
    return wait(start(work, injection))


def start(work: Callable[[], object], injection: Injection | None = None) -> tuple[int, int]:
    """Start a life; `wait` ends it."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_born(work, injection, writer)
    os.close(writer)
    return child, reader


def wait(started: tuple[int, int]) -> End:
    """Wait for the end of a life."""
    child, reader = started
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return End(-os.WTERMSIG(status), "", [])
    said = json.loads(text) if text else {"message": "no word", "operations": "[]"}
    return End(os.WEXITSTATUS(status), said["message"], json.loads(said["operations"]))


def _be_born(work: Callable[[], object], injection: Injection | None, writer: int) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background ignores it
    status, message = 0, ""
    try:
        if injection is not None:
            injection.install()
        work()
    except ChainLoRAError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 1, "interrupted"
    except BaseException:
        status, message = 2, traceback.format_exc()
    if injection is not None:
        injection.kind = "count"  # what follows is not part of the life
    said = {"message": message, "operations": describe(injection) if injection else "[]"}
    os.write(writer, json.dumps(said).encode())
    os._exit(status)


def run_with_signals(config: RunConfig) -> None:
    """Train as the command line does: a signal finishes the step and saves."""
    with interruptible() as interrupts:

        def listener(event: Any) -> None:
            if event.name == "plan":
                interrupts.defer()

        train(config, resume=Path(config.output or "").exists(), listener=listener)


def run(config: RunConfig) -> None:
    """Train, or resume where there is something to resume: what a user does after a fault."""
    train(config, resume=Path(config.output or "").exists())


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a finished run has to be the same in, whatever happened on the way."""
    manifest = json.loads((folder / "chain.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    binary = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "adapter_config.json"
    ]
    for each in records:
        each.pop("seconds", None)
    manifest["progress"].pop("seconds")
    return {
        "files": {path.relative_to(folder).as_posix(): path.read_bytes() for path in binary},
        "names": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")),
        "manifest": {k: manifest[k] for k in ("links", "progress", "selected", "checkpoint")},
        "metrics": result["metrics"],
        "best": result["best"],
        "records": records,
    }


def difference(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Return in what two outcomes differ, empty where they do not."""
    return ", ".join(key for key in one if one[key] != two[key])


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
