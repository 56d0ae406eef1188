"""What a user is told of the rows of a run: columns not read, rows that flatter the scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainlora.config.schema import DataConfig
from chainlora.data.conflicts import changed_answers
from chainlora.data.division import rows_in_both
from chainlora.data.examples import Example
from chainlora.data.kept import Kept
from chainlora.data.mixture import example_hashes
from chainlora.data.rows import Rows, RowsSummary
from chainlora.data.sources import Source, where
from chainlora.errors import DataError

_log = logging.getLogger(__name__)

_SCORED = ("validation", "test")
_WIDTH = 60  # characters of a text that a warning shows


def check_scorable(
    held_out: Sequence[NDArray[np.bool_]], scored: Sequence[NDArray[np.bool_]]
) -> None:
    """Warn of rows held out that do not fit when they are scored; raise DataError for all."""
    count, left = (sum(int(mask.sum()) for mask in masks) for masks in (held_out, scored))
    if count and not left:
        raise DataError(
            "rows held out must fit the context with room for an answer",
            f"none of {count} that do",
            "raise data.max_length, hold out more rows, or set data.truncation: cut",
        )
    if left < count:
        _log.warning(
            "validation: %d of %d rows held out leave no room for an answer in the context, and "
            "are left out (truncation: drop)",
            count - left,
            count,
        )


def tell_lost(split: str, found: RowsSummary) -> None:
    """Warn of rows that were cut or left out, and of pairs with the same answer twice."""
    longer = f"of {found.rows} rows were longer than data.max_length or the context"
    if found.rows_cut:
        _log.warning(
            f"{split}: {found.rows_cut} {longer}; {found.tokens_cut} tokens were cut from their "
            "beginnings (truncation: cut)"
        )
    if found.rows_dropped:
        _log.warning(f"{split}: {found.rows_dropped} {longer}, and are left out (truncation: drop)")
    if found.pairs_equal:
        _log.warning(
            f"{split}: the chosen and the rejected answer are the same in {found.pairs_equal} of "
            f"{found.rows} pairs, which teach no preference; remove them"
        )


def check_pairs(found: RowsSummary, source: Source) -> None:
    """Raise DataError for pairs of preferences that have the same answer twice, all of them."""
    if found.pairs_equal and found.pairs_equal == found.rows:
        raise DataError(
            "the chosen and the rejected answer of a pair must differ",
            f"the same in all {found.rows} of {source}",
            "check the columns, and data.fields",
        )


def tell_unread(encoded: Mapping[str, Rows]) -> None:
    """Name each column that nothing reads once, with the splits that have it."""
    unread = {split: rows.summary.unread for split, rows in encoded.items()}
    alike: dict[str, list[str]] = {}
    for column in dict.fromkeys(chain.from_iterable(unread.values())):
        splits = ", ".join(split for split, columns in unread.items() if column in columns)
        alike.setdefault(splits, []).append(repr(column))
    for splits, columns in alike.items():
        _log.warning("%s: nothing reads %s", splits, ", ".join(columns))


def tell_in_both(
    data: DataConfig, rows: Mapping[str, Rows], sources: Mapping[str, Sequence[Source]]
) -> None:
    """Warn of rows to be scored that are trained on, and of a number of them without a file.

    Rows that are held out are not looked at: they are none (`Division`).
    """
    for split in _SCORED:
        if getattr(data, f"num_{split}") and not rows[split]:
            _log.warning("data.num_%s takes rows of data.%s, which names none", split, split)
        for source in sources[split]:
            if found := rows_in_both(rows["train"], rows[split]):
                first = found[:3]
                named = islice((where(row) for row in source if row.index in first), len(first))
                places = ", ".join(named) + ", …" * (len(found) > 3)
                _log.warning(
                    f"{split}: {len(found)} of {rows[split].summary.rows} rows are training rows "
                    f"too, so that scores on them are too good ({places}); remove them from one of "
                    "the files"
                )


def tell_trained_on(rows: Mapping[str, Rows], earlier: Mapping[str, Kept]) -> None:
    """Warn of rows to be scored that an earlier stage was trained on, which flatter the model."""
    seen = np.concatenate([kept.seen for kept in earlier.values()])
    for split in _SCORED:
        count = int(np.isin(example_hashes(rows[split]), seen).sum())
        if count:
            _log.warning(
                f"{split}: an earlier stage was trained on {count} of {len(rows[split])} rows, so "
                "that scores on them are too good; give other rows, or hold out no more of a file "
                "than that stage did"
            )


def tell_changed(
    stage: str, rows: Rows, earlier: Mapping[str, Kept], tokenizer: Any, keeps: bool
) -> None:
    """Warn of prompts of a stage that have other answers than in earlier stages."""
    found = changed_answers(rows, earlier)
    if not found.prompts:
        return
    shown = ""
    if found.example is not None:
        new, old = (_answer_of(example, tokenizer) for example in found.example)
        asked = _shown(tokenizer, found.example[0].prompt, end=True)
        shown = f", e.g. {asked} (was {old}, now {new})"
    many = found.prompts > 1
    _log.warning(
        "%s: %d prompt%s other answers than in %s%s; %s",
        *(stage, found.prompts, "s have" if many else " has", ", ".join(found.stages), shown),
        "both count (data.keep_conflicts)"
        if keeps
        else "the newest answer counts (keep both by --keep-conflicts)",
    )


def _answer_of(example: Example, tokenizer: Any) -> str:
    """Return the last answer of a row, as it is shown."""
    right = example.right
    start, end = right.scored[0][-1]
    return _shown(tokenizer, right.sequences[0][start:end])


def _shown(tokenizer: Any, tokens: Sequence[int], *, end: bool = False) -> str:
    """Return the beginning of a text, or its end, in quotes and on one line."""
    words = " ".join(str(tokenizer.decode(tokens, skip_special_tokens=True)).split())
    if len(words) > _WIDTH:
        words = f"…{words[-_WIDTH:]}" if end else f"{words[:_WIDTH]}…"
    return json.dumps(words, ensure_ascii=False)
