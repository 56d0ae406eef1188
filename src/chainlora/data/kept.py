"""Rows that a run keeps: a sample of each split, and hashes of all rows.

With them a later stage can, without the data files, replay earlier training rows, hold out earlier
validation rows, leave out rows already trained on, and be scored on earlier rows.

A file of kept rows is a safetensors file with these tensors:

    SPLIT.tokens, SPLIT.lines, SPLIT.ends   the sample of a split (`chainlora.data.rows.flatten`)
    seen       hashes of all training examples, sorted int64 (`chainlora.data.mixture`)
    held_out   hashes of the prompts of all validation rows, sorted int64
    answers    `answer_hashes` of all training rows (`chainlora.data.conflicts`)
    prompts    hashes of the prompts of the sample of ``train``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from chainlora import files
from chainlora.config.schema import PAIR_LOSSES, DataConfig, RunConfig
from chainlora.data.rows import ARRAYS, Rows, StoredRows, flatten
from chainlora.errors import RunError

SAMPLE = 1000
"""Examples kept of each split: a few MB, and accuracy to 1.6 % (one standard error)."""
ASKED = ("loss", "metrics", "metric", "stop", "max_new_tokens")
SPLITS = ("train", "validation", "test")
_HASHES = ("prompts", "seen", "held_out", "answers")
_FORMAT = 2


@dataclass(frozen=True)
class Kept:
    """Rows that a run kept. The module docstring describes the hashes."""

    train: Rows  # the examples with the smallest hashes
    validation: Rows  # the first ones in file order
    test: Rows  # the first ones in file order
    counts: Mapping[str, int]  # examples of each split before sampling
    prompts: NDArray[np.int64]
    seen: NDArray[np.int64]
    held_out: NDArray[np.int64]
    answers: NDArray[np.int64]  # [unique answers, 2]
    asked: Mapping[str, Any]  # the fields `ASKED` of `Splits`: how the rows are scored
    bound: int | None = None  # of `held_out_bound`; None: `data.validation` was a file

    @property
    def loss(self) -> str:
        return str(self.asked["loss"])

    @property
    def metric(self) -> str:
        """Return the metric of the rows in a score matrix; pairs have the accuracy of ranking."""
        return "accuracy" if self.loss in PAIR_LOSSES else str(self.asked["metric"])

    @property
    def scored(self) -> tuple[str, Rows]:
        """Return the split to score a stage on: test, else validation, else training rows."""
        named = {"test": self.test, "validation": self.validation}
        return next(((name, rows) for name, rows in named.items() if rows), ("train", self.train))


def keeps_rows(data: DataConfig) -> bool:
    """Return whether a stage keeps rows; a rehearsal has no new rows to keep."""
    return data.keep_rows and not data.rehearse


def keeps_general(config: RunConfig) -> bool:
    """Return whether a run with this first config keeps answers of its base (`start_data`)."""
    return config.start_data is None and keeps_rows(config.data)


def write_kept(path: Path, kept: Kept) -> None:
    """Write kept rows, whole or not at all."""
    arrays = {name: getattr(kept, name) for name in _HASHES}
    for split in SPLITS:
        flat = flatten(getattr(kept, split)[:])
        arrays |= {f"{split}.{name}": array for name, array in flat.items()}
    facts = {"format": _FORMAT, "counts": kept.counts, "asked": kept.asked, "bound": kept.bound}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    files.write_tensors(path, tensors, {"kept": json.dumps(facts)})


def read_kept(path: Path) -> Kept:
    """Read kept rows, whose checksum `OpenState.kept` verifies. Raises RunError if unreadable."""
    try:
        with safe_open(path, "np") as file:
            facts = json.loads(file.metadata()["kept"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["format"] != _FORMAT:
            raise ValueError(f"format {facts['format']}")
        values: dict[str, Any] = {
            split: StoredRows({name: arrays[f"{split}.{name}"] for name in ARRAYS})
            for split in SPLITS
        }
        values |= {name: arrays[name] for name in _HASHES}
        return Kept(**values, **{name: facts[name] for name in ("counts", "asked", "bound")})
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            "kept rows must be readable",
            f"{path}: {error}",
            "restore the file from a copy, or start over",
        ) from None
