"""What each row scored, kept beside a cell's result: a few bytes a row and split.

``rows.safetensors`` holds, for each split, ``<split>.row`` (its number) and one float32 a row for
each of: ``loss`` (cross-entropy over candidates, or mean negative log-likelihood of a token),
``correct`` (1 or 0), ``em`` and ``token_f1`` (answers in words).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from chainlora.evaluation.metrics import TEXT_METRICS
from chainlora.files import write_bytes

FILE = "rows.safetensors"
Rows = dict[str, np.ndarray]


def row_scores(split: str, predictions: Sequence[Mapping[str, Any]]) -> Rows:
    """Return what an evaluation's predictions say of each row, by ``<split>.<what>``."""
    found: Rows = {f"{split}.row": np.array([each["row"] for each in predictions], np.int32)}
    for name in ("loss", "correct", *TEXT_METRICS):
        values = [_score(name, each) for each in predictions]
        if all(value is not None for value in values):
            found[f"{split}.{name}"] = np.array(values, np.float32)
    return found


def _score(name: str, row: Mapping[str, Any]) -> float | None:
    scores, label = row["scores"], row["label"]
    if name == "loss":
        return _loss(scores, label) if scores else None
    if name == "correct":
        return None if label is None else float(row["prediction"] == label)
    if not isinstance(row["prediction"], str) or not row.get("references"):
        return None
    return float(TEXT_METRICS[name](row["prediction"], row["references"]))


def _loss(scores: Sequence[float], label: int | None) -> float:
    if label is None:
        return -scores[0]
    values = np.asarray(scores, np.float64)
    top = values.max()
    if top == -np.inf:
        return float(np.log(len(values)))
    return float(top + np.log(np.exp(values - top).sum()) - values[label])


def write_rows(directory: Path, rows: Rows) -> None:
    """Write what each row scored, atomically; nothing for no rows."""
    if not rows:
        return
    write_bytes(directory / FILE, save(rows))


def read_rows(directory: Path) -> Rows:
    """Return what each row of a cell scored; empty where that was not kept."""
    path = directory / FILE
    return dict(load_file(path)) if path.is_file() else {}
