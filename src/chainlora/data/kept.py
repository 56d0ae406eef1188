"""Rows that a run keeps: a sample of each split, and hashes of all rows.

With them a later stage can, without the data files, replay earlier training rows, hold out earlier
validation rows, leave out rows already trained on, and be scored on earlier rows.

A file of kept rows is a safetensors file with these tensors:

    SPLIT.tokens, SPLIT.lines, SPLIT.ends   the sample of a split (`chainlora.data.rows.flatten`)
    seen       hashes of all training examples, sorted int64 (`chainlora.data.mixture`)
    held_out   hashes of the prompts of all validation rows, sorted int64
    answers    `answer_hashes` of all training rows
    prompts    hashes of the prompts of the sample of ``train``
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from chainlora import files
from chainlora.config.schema import PAIR_LOSSES, RunConfig
from chainlora.data.examples import Example
from chainlora.data.rows import ARRAYS, PickedRows, Rows, StoredRows, flatten
from chainlora.errors import RunError

SAMPLE = 1000
"""Examples kept of each split: a few MB, and accuracy to 1.6 % (one standard error)."""
ASKED = ("loss", "metrics", "metric", "stop", "max_new_tokens")
SPLITS = ("train", "validation", "test")
_HASHES = ("prompts", "seen", "held_out", "answers")
_FORMAT = 3


@dataclass(frozen=True)
class Kept:
    """Rows that a run kept. The module docstring describes the hashes."""

    train: Rows  # the examples with the smallest hashes
    validation: Rows  # spread evenly over the file
    test: Rows  # the same
    counts: Mapping[str, int]  # examples of each split before sampling
    prompts: NDArray[np.int64]
    seen: NDArray[np.int64]
    held_out: NDArray[np.int64]
    answers: NDArray[np.int64]  # [unique answers, 2]
    asked: Mapping[str, Any]  # the fields `ASKED` of `Splits`: how the rows are scored
    bound: int | None = None  # of `held_out_bound`; None: `data.validation` was a file
    vocabulary: int = 0  # the largest token id of rows that were read, plus 1

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


def keeps_general(config: RunConfig) -> bool:
    """Return whether a run with this first config keeps answers of its base (`start_data`)."""
    return config.start_data is None and bool(config.data.keep_rows)


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
            raise ValueError(f"format {facts['format']} of another version")
        tokens = np.concatenate([arrays[f"{split}.tokens"] for split in SPLITS])
        if tokens.dtype != np.int32 or tokens.min(initial=0) < 0:
            raise ValueError("token ids must be int32, and not negative")
        values: dict[str, Any] = {
            split: StoredRows({name: arrays[f"{split}.{name}"] for name in ARRAYS})
            for split in SPLITS
        }
        values |= {name: arrays[name] for name in _HASHES}
        values["vocabulary"] = int(tokens.max(initial=-1)) + 1
        return Kept(**values, **{name: facts[name] for name in ("counts", "asked", "bound")})
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            "kept rows must be readable",
            f"{path}: {error}",
            "restore the file from a copy, or start over",
        ) from None


def need_embedded(kept: Mapping[str, Kept], model: Any) -> None:
    """Raise RunError if kept rows of an entry have tokens that the model does not know."""
    known = model.get_input_embeddings().weight.shape[0]
    for key, rows in kept.items():
        if rows.vocabulary > known:
            rule = f"kept rows must have tokens of the model, 0 to {known - 1}"
            got = f"{rows.vocabulary - 1} in rows of {key}"
            raise RunError(rule, got, "restore the run from a copy")


# --- changed facts: prompts that a later stage answers differently than an earlier one ---

# A prompt is the text before the last answer of a row; in a dialogue it includes the earlier
# turns. By default the newest answer to a prompt counts: replay and combinations skip
# earlier rows with the same prompt and another answer. Rows on disk and scores do not change.

NOTHING: NDArray[np.int64] = np.empty((0, 2), np.int64)  # answers of no rows


def answer_hashes(rows: Iterable[Example]) -> NDArray[np.int64]:
    """Return `Example.answer_hashes` of each row ([rows, 2])."""
    hashes = chain.from_iterable(row.answer_hashes for row in rows)
    return np.fromiter(hashes, np.int64).reshape(-1, 2)


def newest(kept: Mapping[str, Kept], later: NDArray[np.int64] = NOTHING) -> dict[str, Kept]:
    """Return the kept rows of each stage, in the order of the stages, without superseded rows.

    A row of any split is superseded if later stages train on its prompt, and the last of them has
    only other answers. `later` has the `answer_hashes` ([rows, 2]) of the next stage.
    """
    newest_rows = {}
    for stage, stage_rows in reversed([*kept.items()]):
        newest_rows[stage] = _without(stage_rows, later)
        new = stage_rows.answers[~np.isin(stage_rows.answers[:, 0], later[:, 0])]
        later = np.concatenate([later, new])
    return {stage: newest_rows[stage] for stage in kept}


def _without(kept: Kept, later: NDArray[np.int64]) -> Kept:
    """Remove the rows that later answers supersede."""
    masks = {split: _is_old(answer_hashes(getattr(kept, split)), later) for split in SPLITS}
    if not any(mask.any() for mask in masks.values()):
        return kept
    rows: dict[str, Any] = {
        split: PickedRows(getattr(kept, split), np.flatnonzero(~mask))
        for split, mask in masks.items()
    }
    return replace(kept, **rows, prompts=kept.prompts[~masks["train"]])


def _is_old(answers: NDArray[np.int64], later: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which answers are superseded: `later` has their prompt, but not their answer."""
    has_prompt = np.isin(answers[:, 0], later[:, 0])
    return has_prompt & ~np.isin(answers[:, 1], later[:, 1])


class Changed(NamedTuple):
    """Prompts of a stage that earlier stages answer differently."""

    prompts: int  # how many
    stages: tuple[str, ...]  # the earlier stages
    example: tuple[Example, Example] | None  # a new row and an earlier one, if the latter was kept


def changed_answers(rows: Rows, earlier: Mapping[str, Kept]) -> Changed:
    """Compare the training rows of a stage with those of earlier stages, kept or not."""
    new = answer_hashes(rows)
    old = {name: kept.answers[_is_old(kept.answers, new), 0] for name, kept in earlier.items()}
    stages = tuple(name for name, prompts in old.items() if len(prompts))
    before: dict[int, Example] = {}
    for name in stages:
        hashes = answer_hashes(earlier[name].train)
        places = np.flatnonzero(_is_old(hashes, new)).tolist()
        before |= {int(hashes[place, 0]): earlier[name].train[place] for place in places}
    pairs = ((rows[k], before[p]) for k, p in enumerate(new[:, 0].tolist()) if p in before)
    count = len(np.unique(np.concatenate([NOTHING[:, 0], *old.values()])))
    return Changed(count, stages, next(pairs, None))
