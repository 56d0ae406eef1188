"""Stages beside each other on a task's rows, and how their runs are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import settings, train_all, train_on


def section(sentiment: Path, name: str, **keys: Any) -> dict[str, Any]:
    """A stage on the task's rows, in part others for each name."""
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


def add(sentiment: Path, run: Path, name: str) -> None:
    train_on(run, section(sentiment, name), beside=True)
