"""Runs of several stages, on top of each other and beside, and how they are stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from conftest import write_rows
from faults.lives import live
from helpers import Stop, settings, train_all, train_on

from chainlora import load_run
from chainlora.files import checksums
from chainlora.runs.history_file import read_history
from chainlora.training.plan import make_plan


def two_stages(tiny_folder: Path, sentiment: Path, folder: Path) -> dict:
    """Return a config of two stages: three links on all rows, two on rows of another order."""
    sentiment = shutil.copytree(sentiment, folder / "rows")
    rows = (sentiment / "train.jsonl").read_text().splitlines()
    (folder / "more.jsonl").write_text("\n".join(rows[::-1][:12]) + "\n")
    shared = settings(tiny_folder, sentiment, folder / "run")
    facts = {"ranks": [4, 4, 2], "steps": [2, 2, 2]}
    style = {"ranks": [2, 2], "steps": [2, 3]}
    shared["chain"] = {"alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    data = shared.pop("data")
    more = data | {"train": str(folder / "more.jsonl")}
    shared["stages"] = [
        {"name": "facts", "chain": facts, "data": data},
        {"name": "style", "beside": False, "chain": style, "data": more},
    ]
    return shared


def copied(config: dict, folder: Path) -> dict:
    shutil.copytree(config["output"], folder / "run")
    return deepcopy(config) | {"output": str(folder / "run")}


def flipped(rows: Path, file: Path) -> Path:
    """Write rows whose answers are the opposite."""
    lines = map(json.loads, rows.read_text().splitlines())
    return write_rows(file, [line | {"label": 1 - line["label"]} for line in lines])


def stage_of(config: dict, name: str) -> dict:
    return next(stage for stage in config["stages"] if stage["name"] == name)


def one_stage(config: dict) -> dict:
    return config | {"stages": config["stages"][:1]}


def logits(run, **keys) -> torch.Tensor:
    model, tokenizer = load_run(run, **keys)
    return model(**tokenizer("a fine film", return_tensors="pt")).logits.detach()


def survey(stages) -> list:
    """Where each stage of a plan is."""
    return list(make_plan(stages).stages)


def files_of(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in checksums(run).items() if not name.startswith(".lock")}


def stopping_after(total: int):
    """Stop where `total` steps of both stages are done: step 3 of 6, or step 2 of the second."""

    def listener(event) -> None:
        done = event.step + (6 if stage[0] == "style" else 0)
        stage[0] = getattr(event, "stage", stage[0])
        if event.name == "step" and done == total:
            raise Stop

    stage = [""]
    return listener


def section(sentiment: Path, name: str, **keys: Any) -> dict[str, Any]:
    """A stage on the task's rows, in part others for each name; they stand beside each other."""
    task, rows = sentiment / "task.yaml", sentiment / "train.jsonl"
    other = sentiment.with_name(f"{sentiment.name}-{name}.jsonl")
    lines = rows.read_text().splitlines()
    first = "abcd".index(name[0]) * 6
    other.write_text("\n".join(lines[first : first + 16]) + "\n")
    data = {"task": str(task), "train": str(other), "validation": 4}
    return {"name": name, "data": data, "chain": {"ranks": [2], "steps": [3]} | keys}


def config_of(tiny_folder: Path, sentiment: Path, run: Path, *stages: dict[str, Any]) -> Any:
    tree = settings(tiny_folder, sentiment, run)
    tree["chain"] = {"alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    del tree["data"]
    return tree | {"stages": [section(sentiment, "a"), *stages]}


def begin(tiny_folder: Path, sentiment: Path, run: Path) -> Path:
    """Train stage `a` of a new run."""
    train_all(config_of(tiny_folder, sentiment, run))
    return run


def train_beside(sentiment: Path, run: Path, name: str) -> None:
    train_on(run, section(sentiment, name), beside=True)


def at(event: str, act: Callable[[], object], stage: str = "") -> Callable[[Any], None]:
    """Return a listener that does something once, at an event of a stage."""
    now, done = [""], []

    def listener(found: Any) -> None:
        now[0] = found.stage if found.name == "stage" else now[0]
        if found.name == event and stage in ("", now[0]) and not done:
            done.append(event)
            act()

    return listener


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(event: str, address: Path | str, own: dict[str, Any], **keys: Any) -> None:
    """Add a stage in another process, which is killed at an event."""
    keys = {"beside": True} | keys
    end = live(lambda: train_on(address, own, listener=at(event, die), **keys))
    assert end.status == -9, end.message


def unbuilt(run: Path) -> list[str]:
    """Stages of a run's plan that have no state yet."""
    history = read_history(run)
    return [name for name in history.plan().names if history.find(name) is None]
