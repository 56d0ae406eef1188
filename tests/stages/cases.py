"""Configs of two and three stages, and how their runs are looked at."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from conftest import write_rows
from helpers import Stop, settings

from chainlora import load_run
from chainlora.files import checksums
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
