"""Rows that a run keeps: a sample to score and to read again later, and hashes of all its rows.

A later stage replays training rows of earlier ones, holds out their validation rows, leaves out
what was trained on, and is scored on all of them, on a machine without the data files.

A file of kept rows is safetensors: of each split, as ``train.tokens`` and so on, the arrays of
`chainlora.data.rows.flatten`; ``seen`` and ``held_out``, the sorted hashes (int64) of all training
examples and of the prompts of all validation rows (`chainlora.data.mixture`); ``answers``, those of
the prompts and answers of all training rows (`chainlora.data.conflicts`); ``prompts``, those of the
prompts of ``train``.
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
    """Rows that a run kept.

    `train` are the training examples of the smallest hashes, and `prompts` the hashes of their
    prompts; `validation` and `test` are the first ones in file order; `counts` says how many there
    were of each split. `answers` are the `answer_hashes` of all training examples, each once.
    `asked` is what `Splits` says of how they are scored (`ASKED`), `bound` what `data.validation`
    held out (`held_out_bound`), None where it was a file.
    """

    train: Rows
    validation: Rows
    test: Rows
    counts: Mapping[str, int]
    prompts: NDArray[np.int64]
    seen: NDArray[np.int64]
    held_out: NDArray[np.int64]
    answers: NDArray[np.int64]
    asked: Mapping[str, Any]
    bound: int | None = None

    @property
    def loss(self) -> str:
        return str(self.asked["loss"])

    @property
    def metric(self) -> str:
        """Return what the rows are judged by in a matrix; pairs by how many are ranked right."""
        return "accuracy" if self.loss in PAIR_LOSSES else str(self.asked["metric"])

    @property
    def scored(self) -> tuple[str, Rows]:
        """Return the split to score a stage by, test before validation before training rows."""
        named = {"test": self.test, "validation": self.validation}
        return next(((name, rows) for name, rows in named.items() if rows), ("train", self.train))


def keeps_rows(data: DataConfig) -> bool:
    """Say whether a stage keeps rows; a rehearsal has none of its own."""
    return data.keep_rows and not data.rehearse


def keeps_general(config: RunConfig) -> bool:
    """Say whether a run that begins with this config keeps what its model writes (`start_data`)."""
    return config.start_data is None and keeps_rows(config.data)


def write_kept(path: Path, kept: Kept) -> None:
    """Write kept rows, whole or not at all."""
    arrays = {name: getattr(kept, name) for name in _HASHES}
    for split in SPLITS:
        found = flatten(getattr(kept, split)[:])
        arrays |= {f"{split}.{name}": array for name, array in found.items()}
    said = {"format": _FORMAT, "counts": dict(kept.counts), "asked": dict(kept.asked)}
    said["bound"] = kept.bound
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    files.write_tensors(path, tensors, {"kept": json.dumps(said)})


def read_kept(path: Path) -> Kept:
    """Read kept rows. Raises RunError where these are none; `OpenState.kept` checks the bytes."""
    try:
        with safe_open(path, "np") as file:
            said = json.loads(file.metadata()["kept"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said["format"] != _FORMAT:
            raise ValueError(f"format {said['format']}")
        train, validation, test = (
            StoredRows({name: arrays[f"{split}.{name}"] for name in ARRAYS}) for split in SPLITS
        )
        hashes = {name: arrays[name] for name in _HASHES}
        said = {name: said[name] for name in ("counts", "asked", "bound")}
        return Kept(train, validation, test, **hashes, **said)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            "rows that a run keeps must be readable",
            f"{path}: {error}",
            "restore the file from a copy, or start over",
        ) from None
