"""Divide the rows of the training files: rows to train on, rows to hold out, rows to leave out.

Only the prompt of a row decides. A row is held out for validation if the hash of its prompt is
below the run's bound. It is left out if it was a validation row of an earlier stage.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chainlora.config.schema import DataConfig
from chainlora.data.examples import Example
from chainlora.data.kept import Kept
from chainlora.data.mixture import example_hashes, held_out_bound, prompt_hashes
from chainlora.data.rows import MemoryRows, PickedRows, Rows, RowsSummary
from chainlora.errors import ConfigError

_log = logging.getLogger(__name__)

Masks = list[NDArray[np.bool_]]


@dataclass(frozen=True)
class Division:
    """The use of every example of the training files, as one mask per file."""

    train: Masks
    validation: Masks
    bound: int | None = None  # of `held_out_bound`; None: nothing is held out
    counts: dict[str, int] = field(default_factory=dict)
    """Examples by reason: `held_out`; `left_out`, validation rows of earlier stages; `seen`, rows
    that earlier stages trained on."""


def divide(
    files: Sequence[Rows], data: DataConfig, earlier: Sequence[Kept] = (), bound: int | None = None
) -> Division:
    """Divide the rows of training files, encoded for training; `bound` is the run's, if it has one.

    Raises ConfigError if no rows are left to train on, or none are held out.
    """
    validated = np.unique(_joined(kept.held_out for kept in earlier))
    trained = np.unique(_joined(kept.seen for kept in earlier))
    held_out = left_out = seen = [np.zeros(len(rows), bool) for rows in files]
    if data.holds_out or len(validated):
        prompts = [prompt_hashes(rows) for rows in files]
        left_out = [np.isin(hashes, validated) for hashes in prompts]
        if data.holds_out and bound is None:
            bound = _new_bound(_joined(prompts), data)
        if bound is not None:
            held_out = [hashes < bound for hashes in prompts]
    if data.new_rows_only and len(trained):
        seen = [np.isin(example_hashes(rows), trained) for rows in files]
    train, counts = list[NDArray[np.bool_]](), Counter[str]()
    for is_held_out, is_left_out, is_seen in zip(held_out, left_out, seen, strict=True):
        train.append(~(is_held_out | is_left_out | is_seen))
        counts["held_out"] += int(is_held_out.sum())
        counts["left_out"] += int((is_left_out & ~is_held_out).sum())
        counts["seen"] += int((is_seen & ~is_left_out & ~is_held_out).sum())
    if any(counts.values()) and not any(mask.any() for mask in train):
        raise ConfigError(
            "training needs rows that no stage has held out or, with `data.new_rows_only`, seen",
            ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()),
            "add rows, or hold out fewer",
        )
    return Division(train, held_out, bound, {name: n for name, n in counts.items() if n})


def _new_bound(prompts: NDArray[np.int64], data: DataConfig) -> int:
    """Return the bound of a run that holds out rows for the first time."""
    assert isinstance(data.validation, int | float)
    bound = held_out_bound(prompts, data.validation)
    if not 0 < (prompts < bound).sum() < len(prompts):
        raise ConfigError(
            "`data.validation` must hold out some prompts, and leave some to train on",
            f"{data.validation} of {len(np.unique(prompts))}",
            "give another share or number, or more rows",
        )
    return bound


def rows_again(
    earlier: Mapping[str, Kept], loss: str, validation: Iterable[Example], max_length: int
) -> list[Rows]:
    """Return the rows that a stage with this loss can read again, by earlier stage with such rows
    (`data.replay`).

    They are no validation rows of this stage or an earlier one, and no longer than `max_length`.
    Ranked candidates become the right one if this stage learns completions. Raises ConfigError
    if no rows are left.
    """
    held_out = [prompt_hashes(validation), *(k.held_out for k in earlier.values())]
    again, other_losses, num_long = list[Rows](), [], 0
    for stage, kept in earlier.items():
        if not can_read_again(kept.loss, loss):
            other_losses.append(f"{stage}: {kept.loss}")
            continue
        rows = pick(kept.train, ~np.isin(kept.prompts, np.concatenate(held_out)))
        examples: Sequence[Example] = rows
        if loss == "completion":
            examples = [row.right for row in rows]
        elif loss == "candidates":  # new rows of the start may be of another kind than its old ones
            examples = [row for row in rows if row.label is not None]
        fitting = MemoryRows([e for e in examples if max(map(len, e.sequences)) <= max_length])
        num_long += len(examples) - len(fitting)
        if fitting:
            digest = hashlib.sha256(example_hashes(fitting).tobytes()).hexdigest()
            fitting.summary = RowsSummary(digest=digest)
            again.append(fitting)
    too_long = f"{num_long} rows of more than {max_length} tokens"
    if not again:
        got = other_losses + [too_long] * bool(num_long)
        superseded = (name for name, k in earlier.items() if k.counts["train"] and not k.train)
        got += [f"later answers to all rows of {name}" for name in superseded]
        raise ConfigError(
            f"`data.replay` needs rows that an earlier stage kept and that are learned by {loss}",
            ", ".join(got) or "none",
            "leave it out",
        )
    if other_losses:
        _log.warning("data.replay: this stage learns by %s, not %s", loss, ", ".join(other_losses))
    if num_long:
        _log.warning("data.replay: leaving out %s", too_long)
    return again


def can_read_again(before: str, loss: str) -> bool:
    """Return whether a stage with `loss` can read rows that a stage with `before` learned."""
    return before == loss or (before, loss) == ("candidates", "completion")


def rows_in_both(train: Rows, others: Rows) -> list[int]:
    """Return the numbers of the rows of `others` that `train` contains too."""

    def hashed(example: Example) -> int:  # ranked candidates are compared by the right one
        right = example.label
        return hash(example.sequences if right is None else example.sequences[right : right + 1])

    hashes = [(hashed(example), example.row) for example in others]
    both = {content for content, _ in hashes}.intersection(map(hashed, train))
    new = {row for content, row in hashes if content not in both}  # a text: all its blocks count
    return list(dict.fromkeys(row for _, row in hashes if row not in new))


def pick(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    """Return the rows where the mask is true."""
    return rows if mask.all() else PickedRows(rows, np.flatnonzero(mask))


def aligned(scored: Rows, files: Rows, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Translate a mask over `files` into one over `scored`: the same rows, encoded for scoring."""
    if not (scored.summary.rows_dropped or files.summary.rows_dropped):
        return mask
    # The encodings differ in length (candidates, room for an answer, end of sequence), so each may
    # lack rows that were too long.
    chosen = {files[int(place)].row for place in np.flatnonzero(mask)}
    return np.array([example.row in chosen for example in scored], bool)


def _joined(hashes: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *hashes])
