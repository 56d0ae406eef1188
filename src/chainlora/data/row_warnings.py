"""Warnings about the rows of a run: unread columns, cuts, rows that make scores too good."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainlora.config.schema import DataConfig
from chainlora.data.division import rows_in_both
from chainlora.data.kept import Kept, changed_answers
from chainlora.data.mixture import example_hashes, prompt_hashes
from chainlora.data.rows import Rows, RowsSummary
from chainlora.data.sources import Source, where
from chainlora.errors import DataError

_log = logging.getLogger(__name__)

CHANGED = "other answers than in"  # text of a warning; the board searches for it
_SCORED = ("validation", "test")
_WIDTH = 60  # characters of a text that a warning shows


def check_scorable(
    held_out: Sequence[NDArray[np.bool_]],
    scored: Sequence[NDArray[np.bool_]],
    *,
    need_all: bool = False,
) -> None:
    """Warn of held-out rows that are too long to be scored. Raises DataError if all are, or if
    `need_all` and some are."""
    count, left = (sum(int(mask.sum()) for mask in masks) for masks in (held_out, scored))
    if left < count and (need_all or not left):
        raise DataError(
            "held-out rows must fit the context with room for an answer",
            f"{count - left} rows that do not",
            "raise data.max_length, hold out more rows, or set data.truncation: cut",
        )
    if left < count:
        _log.warning(
            "validation: leaving out %d of %d held-out rows, which leave no room for an answer in "
            "the context (truncation: drop)",
            *(count - left, count),
        )


def warn_of_lost_rows(split: str, summary: RowsSummary) -> None:
    """Warn of rows that were cut, left out or joined, and of pairs with the same answer twice."""
    longer = f"of {summary.rows} rows were longer than data.max_length or the context"
    if summary.rows_cut:
        _log.warning(
            f"{split}: {summary.rows_cut} {longer}; {summary.tokens_cut} tokens were cut from "
            "their beginnings (truncation: cut)"
        )
    if summary.rows_dropped:
        _log.warning(
            f"{split}: {summary.rows_dropped} {longer}, and are left out (truncation: drop)"
        )
    if summary.rows_joined:
        _log.warning(
            f"{split}: nothing separates prompt and answer in {summary.rows_joined} of "
            f"{summary.rows} rows. Begin answers with a space, end prompts with a line break, or "
            "write a task file with a template"
        )
    if summary.pairs_equal:
        _log.warning(
            f"{split}: the chosen and the rejected answer are the same in {summary.pairs_equal} of "
            f"{summary.rows} pairs. These pairs teach no preference. Remove them"
        )


def check_pairs(summary: RowsSummary, source: Source) -> None:
    """Raise DataError if every pair of preferences has the same answer twice."""
    if summary.pairs_equal and summary.pairs_equal == summary.rows:
        raise DataError(
            "the chosen and the rejected answer of a pair must differ",
            f"the same in all {summary.rows} pairs of {source}",
            "check the columns, and data.fields",
        )


def warn_of_unread(encoded: Mapping[str, Rows]) -> None:
    """Warn once of each column that is not read, with the splits that have it."""
    unread = {split: rows.summary.unread for split, rows in encoded.items()}
    alike: dict[str, list[str]] = {}
    for column in dict.fromkeys(chain.from_iterable(unread.values())):
        splits = ", ".join(split for split, columns in unread.items() if column in columns)
        alike.setdefault(splits, []).append(repr(column))
    for splits, columns in alike.items():
        _log.warning("%s: not read: %s", splits, ", ".join(columns))


def warn_of_shared_rows(
    data: DataConfig, rows: Mapping[str, Rows], sources: Mapping[str, Sequence[Source]]
) -> None:
    """Warn of scored rows that are training rows too, and of `num_SPLIT` without a file."""
    for split in _SCORED:
        if getattr(data, f"num_{split}") and not rows[split]:
            _log.warning("data.num_%s has no effect without a file in data.%s", split, split)
        for source in sources[split]:  # held-out rows have none: they are never training rows
            if both := rows_in_both(rows["train"], rows[split]):
                first = both[:3]
                named = islice((where(row) for row in source if row.index in first), len(first))
                places = ", ".join(named) + ", …" * (len(both) > 3)
                _log.warning(
                    f"{split}: {len(both)} of {rows[split].summary.rows} rows are training rows "
                    f"too, so that scores on them are too good ({places}); remove them from one of "
                    "the files"
                )


def warn_of_seen_rows(rows: Mapping[str, Rows], earlier: Mapping[str, Kept]) -> None:
    """Warn of scores that are too good: one stage is trained on rows that another is scored on."""
    for name, kept in earlier.items():
        count = int(np.isin(prompt_hashes(rows["train"]), prompt_hashes(kept.test)).sum())
        if count:
            _log.warning(
                f"train: {count} of {len(rows['train'])} rows have prompts of test rows of {name}, "
                "so that its later scores are too good; remove them from one of the files"
            )
    seen = np.concatenate([kept.seen for kept in earlier.values()])
    for split in _SCORED:
        count = int(np.isin(example_hashes(rows[split]), seen).sum())
        if count:
            _log.warning(
                f"{split}: an earlier stage was trained on {count} of {len(rows[split])} rows, so "
                "that scores on them are too good; give other rows, or hold out at most as much of "
                "a file as that stage did"
            )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Log no warnings of rows in the block: they are read again later, or only compared."""
    package = logging.getLogger("chainlora")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def warn_of_changed(
    stage: str,
    rows: Rows,
    others: Mapping[str, Kept],
    tokenizer: Any,
    keeps: bool,
    *,
    are_later: bool = False,
) -> None:
    """Warn of prompts that other stages answer differently; with `keeps`, both answers count.

    Earlier stages have the older answers, later ones the newer.
    """
    changed = changed_answers(rows, others)
    if not changed.prompts:
        return
    shown = ""
    if changed.example is not None:
        rights = [example.right for example in changed.example]
        answers = [right.sequences[0][slice(*right.scored[0][-1])] for right in rights]
        new, old = (_shown(tokenizer, tokens) for tokens in answers)
        prompt = _shown(tokenizer, changed.example[0].prompt, end=True)
        old, new = (f"here {new}", f"there {old}") if are_later else (f"was {old}", f"now {new}")
        shown = f", e.g. {prompt} ({old}, {new})"
    have, stages = "s have" if changed.prompts > 1 else " has", ", ".join(changed.stages)
    newest = "the newest answer counts (--keep-conflicts keeps both)"
    newest = f"those of {stages}, which is later, count" if are_later else newest
    counts = "both count (data.keep_conflicts)" if keeps else newest
    _log.warning(f"{stage}: {changed.prompts} prompt{have} {CHANGED} {stages}{shown}; {counts}")


def _shown(tokenizer: Any, tokens: Sequence[int], *, end: bool = False) -> str:
    """Return the beginning or the end of a text, quoted, on one line."""
    words = " ".join(str(tokenizer.decode(tokens, skip_special_tokens=True)).split())
    if len(words) > _WIDTH:
        words = f"…{words[-_WIDTH:]}" if end else f"{words[:_WIDTH]}…"
    return json.dumps(words, ensure_ascii=False)
