"""Changed facts: prompts that a later stage answers otherwise than an earlier one.

A prompt is all that the last answer of a row is written after, in tokens; in a dialogue, that is
also the turns before. By default the answers of the last stage with a prompt count: replay,
rehearsals and combinations read no earlier row of that prompt with another answer. Rows on disk and
scores stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example, hash_of
from chainlora.data.kept import SPLITS, Kept
from chainlora.data.rows import PickedRows, Rows

NOTHING: NDArray[np.int64] = np.empty((0, 2), np.int64)  # answers of no rows

# The prompt of a block of plain text: a special token, and the last token of the block before.
_OF_TEXT = 2


def answer_hashes(rows: Iterable[Example]) -> NDArray[np.int64]:
    """Return for each row ([rows, 2]) the hash of its prompt, and that of prompt and right answer.

    Both are equal for plain text, which has no prompt and is never in conflict.
    """
    found = chain.from_iterable(map(_hashes, rows))
    return np.fromiter(found, np.int64).reshape(-1, 2)


def _hashes(row: Example) -> tuple[int, int]:
    right = row.label or 0
    start, end = row.scored[right][-1]
    # Of rows with an empty prompt, only those with the same answer share `prompt_hash`.
    begin = row.prompt_hash.to_bytes(8, "big")
    tokens = np.array(row.sequences[right][:end], "<i4").tobytes()
    said = hash_of(begin + tokens)
    is_text = not row.references and row.label is None and start <= _OF_TEXT
    return said if is_text else hash_of(begin + tokens[: 4 * start]), said


def newest(kept: Mapping[str, Kept], later: NDArray[np.int64] = NOTHING) -> dict[str, Kept]:
    """Return what stages kept, in the order in which they ended, without superseded rows.

    A row is superseded if a later stage trains on its prompt, and the last stage that does so has
    other answers only. This applies to the rows of all splits. `later` are the `answer_hashes` of
    training rows of a stage after these. Stages without superseded rows are returned unchanged.
    """
    found = {}
    for stage, own in reversed([*kept.items()]):
        found[stage] = _without(own, later)
        new = own.answers[~np.isin(own.answers[:, 0], later[:, 0])]
        later = np.concatenate([later, new])
    return {stage: found[stage] for stage in kept}


def _without(kept: Kept, later: NDArray[np.int64]) -> Kept:
    """Return what a stage kept without the rows that later answers supersede."""
    masks = {split: _is_old(answer_hashes(getattr(kept, split)), later) for split in SPLITS}
    if not any(mask.any() for mask in masks.values()):
        return kept
    rows = {s: PickedRows(getattr(kept, s), np.flatnonzero(~mask)) for s, mask in masks.items()}
    train, validation, test = map(rows.__getitem__, SPLITS)
    prompts = kept.prompts[~masks["train"]]
    return replace(kept, train=train, validation=validation, test=test, prompts=prompts)


def _is_old(answers: NDArray[np.int64], later: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which answers are to a prompt that has other answers only in a later stage."""
    asked = np.isin(answers[:, 0], later[:, 0])
    return asked & ~np.isin(answers[:, 1], later[:, 1])


class Changed(NamedTuple):
    """How many prompts of a stage have other answers than in earlier stages, which these are, and a
    row of the new stage with one of an earlier stage, if that kept one."""

    prompts: int
    stages: tuple[str, ...]
    example: tuple[Example, Example] | None


def changed_answers(rows: Rows, earlier: Mapping[str, Kept]) -> Changed:
    """Compare the training rows of a stage with those of earlier stages, also with those that these
    did not keep."""
    own = answer_hashes(rows)
    old = {name: kept.answers[_is_old(kept.answers, own), 0] for name, kept in earlier.items()}
    stages = tuple(name for name, prompts in old.items() if len(prompts))
    before: dict[int, Example] = {}
    for name in stages:
        hashes = answer_hashes(earlier[name].train)
        places = np.flatnonzero(_is_old(hashes, own)).tolist()
        before |= {int(hashes[place, 0]): earlier[name].train[place] for place in places}
    pairs = ((rows[k], before[p]) for k, p in enumerate(own[:, 0].tolist()) if p in before)
    count = len(np.unique(np.concatenate([NOTHING[:, 0], *old.values()])))
    return Changed(count, stages, next(pairs, None))
