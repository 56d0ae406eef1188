"""Which rows of the training files are trained on, and which are held out or left out.

A row is held out by its prompt alone: for validation if its hash is below the run's bound, and for
good if it was a validation row of an earlier stage.
"""

from __future__ import annotations

import hashlib
import logging
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
    """What becomes of every example of the training files: masks, one a file.

    `bound` is that of `held_out_bound`, None where nothing is held out. `counts` says how many
    examples were held out, were validation rows of earlier stages, or were trained on there.
    """

    train: Masks
    validation: Masks
    bound: int | None = None
    counts: dict[str, int] = field(default_factory=dict)


def divide(
    files: Sequence[Rows], data: DataConfig, earlier: Sequence[Kept] = (), bound: int | None = None
) -> Division:
    """Divide the rows of training files, encoded as they are trained on.

    `bound` is that of the run where it is known. Raises ConfigError where no side may be empty.
    """
    before = np.unique(_joined(kept.held_out for kept in earlier))
    seen = np.unique(_joined(kept.seen for kept in earlier))
    prompts = [np.empty(0, np.int64)] * len(files)
    if data.holds_out or len(before):
        prompts = [prompt_hashes(rows) for rows in files]
    if data.holds_out and bound is None:
        assert isinstance(data.validation, int | float)
        every = _joined(prompts)
        bound = held_out_bound(every, data.validation)
        if not 0 < (every < bound).sum() < len(every):
            raise ConfigError(
                "`data.validation` must hold out some prompts, and leave some",
                f"{data.validation} of {len(np.unique(every))}",
                "give another share or number, or more rows",
            )
    nothing = [np.zeros(len(rows), bool) for rows in files]
    held_out = [hashes < bound for hashes in prompts] if bound is not None else nothing
    left_out = [np.isin(hashes, before) for hashes in prompts] if len(before) else nothing
    known = nothing
    if data.new_rows_only and len(seen):
        known = [np.isin(example_hashes(rows), seen) for rows in files]
    parts = list(zip(held_out, left_out, known, strict=True))
    train = [~(out | before | seen) for out, before, seen in parts]
    counts = {
        "held_out": sum(int(out.sum()) for out in held_out),
        "left_out": sum(int((before & ~out).sum()) for out, before, _ in parts),
        "seen": sum(int((seen & ~before & ~out).sum()) for out, before, seen in parts),
    }
    if any(counts.values()) and not any(mask.any() for mask in train):
        raise ConfigError(
            "training needs rows that no stage has held out or, with `data.new_rows_only`, seen",
            ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()),
            "add rows, or hold out fewer",
        )
    return Division(train, held_out, bound, {name: n for name, n in counts.items() if n})


def rows_again(
    key: str, earlier: Mapping[str, Kept], loss: str, validation: Iterable[Example], max_length: int
) -> list[Rows]:
    """Return the rows that a stage with this loss can read again, of each earlier one with some.

    No validation row is among them, of this stage or an earlier one, and no row of more tokens than
    `max_length`. Of ranked candidates the right one is read where completions are learned. Raises
    ConfigError, which names the `key` of the config, where there are none.
    """
    held_out = [prompt_hashes(validation), *(k.held_out for k in earlier.values())]
    found, others, long = list[Rows](), [], 0
    for stage, kept in earlier.items():
        if not can_read_again(kept.loss, loss):
            others.append(f"{stage}: {kept.loss}")
            continue
        rows = pick(kept.train, ~np.isin(kept.prompts, np.concatenate(held_out)))
        again = list(rows) if kept.loss == loss else [row.right for row in rows]
        fitting = [each for each in again if max(map(len, each.sequences)) <= max_length]
        long += len(again) - len(fitting)
        if fitting:
            found.append(MemoryRows(fitting))
            hashes = example_hashes(found[-1]).tobytes()
            found[-1].summary = RowsSummary(digest=hashlib.sha256(hashes).hexdigest())
    lost = f"{long} rows of more than {max_length} tokens"
    if not found:
        changed = [name for name, k in earlier.items() if k.counts["train"] and not k.train]
        got = [*others, *[lost] * bool(long), *(f"later answers to all of {n}" for n in changed)]
        raise ConfigError(
            f"`{key}` needs rows that an earlier stage kept and that are learned by {loss}",
            ", ".join(got) or "none",
            "leave it out",
        )
    if others:
        _log.warning("%s: this stage learns by %s, not %s", key, loss, ", ".join(others))
    if long:
        _log.warning("%s: %s are left out", key, lost)
    return found


def can_read_again(before: str, loss: str) -> bool:
    """Say whether a stage with this loss can read rows again that were learned by another."""
    return before == loss or (before, loss) == ("candidates", "completion")


def rows_in_both(train: Rows, others: Rows) -> list[int]:
    """Return which rows of `others` are trained on with all their tokens.

    Of ranked candidates the right one counts, of a text all its blocks.
    """
    told = [(_hash_of_right(each), each.row) for each in others]
    both = {found for found, _ in told}.intersection(map(_hash_of_right, train))
    new = {row for found, row in told if found not in both}
    return list(dict.fromkeys(row for _, row in told if row not in new))


def _hash_of_right(example: Example) -> int:
    right = example.label
    return hash(example.sequences if right is None else example.sequences[right : right + 1])


def pick(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    """Return the rows that a mask names."""
    return rows if mask.all() else PickedRows(rows, np.flatnonzero(mask))


def aligned(scored: Rows, files: Rows, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask of rows of a file for the same rows, encoded to be scored.

    Either may lack rows that are too long and were dropped: one has candidates or keeps room for an
    answer, the other may have an end of sequence.
    """
    if not (scored.summary.rows_dropped or files.summary.rows_dropped):
        return mask
    chosen = {files[int(place)].row for place in np.flatnonzero(mask)}
    return np.array([each.row in chosen for each in scored], bool)


def _joined(hashes: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *hashes])
