"""Changed facts: prompts that a later stage answers differently than an earlier one.

A prompt is the tokens before the last answer of a row; in a dialogue it includes the earlier turns.
By default the newest answer to a prompt counts: replay, rehearsals and combinations skip earlier
rows with the same prompt and another answer. Rows on disk and scores do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example, hash_of
from chainlora.data.kept import SPLITS, Kept
from chainlora.data.rows import PickedRows, Rows

NOTHING: NDArray[np.int64] = np.empty((0, 2), np.int64)  # answers of no rows

# A block of plain text begins with at most a special token and the last token of the block before.
_MAX_TEXT_PROMPT = 2


def answer_hashes(rows: Iterable[Example]) -> NDArray[np.int64]:
    """Hash the prompt of each row, and the prompt with its right answer ([rows, 2]).

    Both hashes are equal for plain text, which has no prompt and is never in conflict.
    """
    hashes = chain.from_iterable(map(_hashes, rows))
    return np.fromiter(hashes, np.int64).reshape(-1, 2)


def _hashes(row: Example) -> tuple[int, int]:
    right = row.label or 0
    start, end = row.scored[right][-1]
    # Rows with an empty prompt share `prompt_hash` only if their answers are equal.
    begin = row.prompt_hash.to_bytes(8, "big")
    tokens = np.array(row.sequences[right][:end], "<i4").tobytes()
    answer = hash_of(begin + tokens)
    is_text = not row.references and row.label is None and start <= _MAX_TEXT_PROMPT
    return answer if is_text else hash_of(begin + tokens[: 4 * start]), answer  # 4 bytes a token


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
