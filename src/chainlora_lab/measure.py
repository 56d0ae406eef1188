"""What a finished run reached and cost: from its run directory to the fields of a cell's result."""

from __future__ import annotations

import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from operator import mul
from pathlib import Path
from typing import Any

import torch

from chainlora import RunConfig, open_run
from chainlora.config.schema import PAIR_LOSSES
from chainlora.errors import ModelError
from chainlora.models.finding import resolve_model
from chainlora_lab.expansion import compact_config
from chainlora_lab.protocol import CellData, load_task
from chainlora_lab.results import FORMAT

_SOURCES = Path(__file__).parents[1]
_DIGITS = 12  # of a digest


def summarise(config: RunConfig, result: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the fields of a cell (see `results.py`) from what `train` returned and wrote."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in open_run(run).records():
        found[record["event"]].append(dict(record))
    steps, started = found["step"], _by_link(found["gradient"], config)
    tail = steps[-max(1, len(steps) // 10) :]
    metrics = result["metrics"]
    split = "test" if "test" in metrics else "validation"
    metric = task_metric(config)
    return (
        described(config, "done")
        | {
            "score_split": split,
            "score": metrics.get(split, {}).get(metric),
            "validation": metrics.get("validation"),
            "test": metrics.get("test"),
            "majority": metrics.get(split, {}).get("majority"),
            "train_loss": sum(step["loss"] for step in tail) / len(tail) if tail else None,
            "steps": result["steps"],
            "tokens": result["tokens"] + sum(started),
            "start_tokens": sum(started),
            "scored_tokens": result.get("scored_tokens"),
            "rows": result.get("rows"),
            "trainable_parameters": result["trainable_parameters"] if steps else 0,
            "wall_s": result["wall_s"],
            "peak_rss_mb": result["peak_memory_mb"],
            "link_steps": [
                sum(step["link"] == link for step in steps)
                for link in range(len(config.chain.ranks))
            ],
            "link_tokens": [a + b for a, b in zip(_by_link(steps, config), started, strict=True)],
            "soft_knots": len(found["soft_knot"]),
            "curve": [
                {key: value for key, value in each.items() if key not in ("event", "seconds")}
                for each in found["eval"]
            ],
        }
        | origin(config, result)
    )


def origin(config: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say what a cell was computed from, and by what."""
    hardware = result["hardware"]
    return {
        "rows_digest": _digest(result["rows_digest"]),
        "base_fingerprint": _digest(result["base_fingerprint"]),
        "base_file": base_file(config.model),
        "versions": result["versions"],
        "hardware": hardware | _accelerator(hardware["device"]),
    }


def described(config: RunConfig, status: str) -> dict[str, Any]:
    """Return the fields that say what a cell is: all there is of one whose loss diverged."""
    return {
        "format": FORMAT,
        "status": status,
        "metric": task_metric(config),
        "ranks": list(config.chain.ranks),
        "config": compact_config(config),
        "commit": commit(),
    }


def task_metric(config: RunConfig) -> str:
    """Return the metric a run is judged by: the task's own, the accuracy for pairs, else the loss.

    Losses of pairs are not compared: each has its objective's own scale.
    """
    if config.train.loss in PAIR_LOSSES:
        return "accuracy"
    return load_task(config.data.task).metric if config.data.task is not None else "loss"


def _by_link(records: Iterable[Mapping[str, Any]], config: RunConfig) -> list[int]:
    """Sum the tokens of records by link."""
    tokens = [0] * len(config.chain.ranks)
    for record in records:
        tokens[record["link"]] += record["tokens"]
    return tokens


def _digest(value: str) -> str:
    """Return the first digits of a digest and what its definition calls itself, else 1."""
    definition, _, digits = value.rpartition(":")
    return f"{definition or 1}:{digits[:_DIGITS]}"


# --- curves ---


def with_curve(config: RunConfig, num_points: int) -> RunConfig:
    """Return the config with evaluations at some `num_points` steps, where it leaves that open.

    Evaluations change no weight, so a cell's id is that of the config without them. A config that
    decides by them (`keep_best`, `early_stop`), sets its own `eval_every` or says
    `eval_at_knots: false` is left alone.
    """
    train, steps = config.train, training_steps(config)
    decided = train.eval_every or train.keep_best or train.early_stop or not train.eval_at_knots
    if not num_points or decided or not steps or getattr(config, "stages", None):
        return config
    every = max(1, round(steps / num_points))
    return config.model_copy(update={"train": train.model_copy(update={"eval_every": every})})


def training_steps(config: RunConfig) -> int | None:
    """Return the steps of a run, as far as its config tells; None where only the rows could."""
    chain, train = config.chain, config.train
    if chain.steps is not None:
        return sum(chain.steps)
    rows = _num_rows(config)
    if chain.epochs is None or rows is None:
        return None
    per_epoch = math.ceil(rows / (train.batch_size * train.gradient_accumulation))
    return round(sum(chain.epochs) * per_epoch)


def _num_rows(config: RunConfig) -> int | None:
    data = config.data
    if data.num_train is not None:
        return data.num_train
    paths = [Path(file.path) for file in data.train_files]
    if paths:
        known = all(path.suffix == ".jsonl" and path.is_file() for path in paths)
        weights = [file.weight for file in data.train_files]
        return round(sum(map(mul, weights, map(_count_lines, paths)))) if known else None
    return data.size("train") if isinstance(data, CellData) and data.is_drawn else None


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


# --- what computed it ---


@cache
def commit() -> str | None:
    """Return the commit of the checkout that this runs from, with a + if its files differ from it;
    None if there is none."""

    def git(*arguments: str) -> str | None:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("chainlora", "chainlora_lab")
    if git("ls-files", "--error-unmatch", *packages) is None:
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}+" if head and git("status", "--porcelain", "--", *packages) else head


def _accelerator(device: str) -> dict[str, str]:
    """Return what names the kernels of a GPU; nothing for a CPU, which is recorded already."""
    if not device.startswith("cuda"):
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": f"{torch.cuda.get_device_name(device)} sm_{major}{minor}",
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def base_file(model: str) -> str | None:
    """Return the file a base was dequantised from (``model.Q4_1.gguf``); None if it was not."""
    try:
        source = resolve_model(model) / "source.json"
    except ModelError:
        return None
    if not source.is_file():
        return None
    found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return found.get("file")
