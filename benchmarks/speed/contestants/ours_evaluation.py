"""Our scoring: rows to tokens to scores, the model loaded beforehand; what `chainlora evaluate`
runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from chainlora.data.sources import find_source
from chainlora.data.splits import encode_split
from chainlora.data.tasks import load_task
from chainlora.evaluation.evaluate import evaluate
from chainlora.models.loading import load_model
from chainlora.models.text_config import context_length


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Score the rows of a task."""
    task, rows = load_task(spec["files"]["task"]), list(find_source(spec["files"]["rows"]))
    model, tokenizer = load_model(spec["model"], getattr(torch, spec["dtype"]))
    began = time.perf_counter()
    examples = encode_split(task, rows, tokenizer, context_length(model))
    encoded = time.perf_counter()
    found = evaluate(model, examples, metrics=task.metric, tokenizer=tokenizer)
    seconds = time.perf_counter() - began
    return {
        "rows_per_second": len(rows) / seconds,
        "seconds": seconds,
        "seconds_of_tokenising": encoded - began,
        "accuracy": found.metrics["accuracy"],
        "scores": [p["scores"] for p in found.predictions],
    }
