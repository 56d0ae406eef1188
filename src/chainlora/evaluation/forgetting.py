"""Undo the stage of a command if earlier rows score worse with it (`--max-forgetting`).

The rows of the matrix (`evaluation.stage_scores`) for the states before and after are compared, in
each column of the state before.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Collection
from pathlib import Path

from chainlora.errors import ConfigError, ForgettingError, RunError
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.stage_scores import Cell, Progress, stage_matrix
from chainlora.runs.addresses import state_at
from chainlora.runs.changes import later_of, undo
from chainlora.runs.entries import BASE
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.keys import Made
from chainlora.runs.open_base import OpenBase

logger = logging.getLogger(__name__)


def need_scored_rows(run: Path, history: History, limit: float) -> None:
    """Raise ConfigError for an invalid limit, RunError for a run without kept rows to score."""
    if not 0 <= limit < math.inf:
        raise ConfigError("--max-forgetting must be 0 or more", limit, "give 0.02, for example")
    state = state_at(run, history)
    if not state.keepers.keys() & {*state.columns.values()}:
        rule = "--max-forgetting compares scores of rows that the run has kept before"
        got = f"none in {run}" if history.entries else "a new run"
        raise RunError(rule, got, "leave it out, or train earlier stages with data.keep_rows: true")


def check_forgetting(
    run: Path, names: Collection[str], limit: float, progress: Progress, base: OpenBase | None
) -> str:
    """Compare a run before and after stages of these names; return a sentence about the result.

    `limit` is the largest accepted loss of a column (`loss_of`). If the run is not made of the
    stages, the sentence is empty.

    Raises ForgettingError if a column has lost more; then the stages are undone.
    """
    history = read_history(run)
    before, after = _before_and_after(history, names)
    if before is None or after is None:
        text = "--max-forgetting: not compared, since %s is no longer the last change of %s"
        logger.warning(text, ", ".join(names), run)
        return ""
    rows = [
        stage_matrix(state_at(run, history, key), progress=progress, base=base, of=columns).grid[-1]
        for columns in [list(state_at(run, history, before).columns)]
        for key in (before, after)
    ]
    pairs = [(a, b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
    worse = [_sentence(a, b) for a, b in pairs if not loss_of(a, b) <= limit]  # also if NaN
    change = f"{after} instead of {before}"
    if not worse:
        columns = ", ".join(a.stage for a, _ in pairs)
        return f"no column of {columns} lost more than {limit:g} by {change}"
    if read_history(run).head == after:
        undo(run)
    raise ForgettingError(
        f"{change} forgets more than --max-forgetting {limit:g}",
        "; ".join(worse),
        f"{run} is {before}, as before; chainlora redo {shlex.quote(str(run))} takes {after}",
    )


def _before_and_after(history: History, names: Collection[str]) -> tuple[str | None, str | None]:
    """Return what a run was before stages of these names, and what it is with them."""
    if not {*names} <= {*history.plan().names}:
        later = (key for key in later_of(history) if {*names} <= history.below(key))
        return history.head, next(later, None)
    after, made = history.head, Made(history)
    for place in history.ancestors():  # other stages may have been added in between, and undone
        root = history.recipes(place).root
        key = getattr(made.entry(root), "key", BASE)
        is_below = {*history.parts(key)} <= history.below(after)
        if made.is_made(root) and is_below and not history.below(key) & {*names}:
            return key, after
    return None, None


def loss_of(before: Cell, after: Cell) -> float:
    """Return the loss of a score: its decrease, or for a loss the relative rise of perplexity."""
    if is_higher_better(before.metric):
        return round(before.value - after.value, 12)  # 0.9 - 0.88 is more than 0.02 in floats
    if before.metric == "loss":
        return math.expm1(min(after.value - before.value, 700))
    return after.value / before.value - 1


def _sentence(before: Cell, after: Cell) -> str:
    verb = "fell" if is_higher_better(before.metric) else "rose"
    rise = "" if verb == "fell" else f", perplexity by {loss_of(before, after):.1%}"
    values = f"from {before.value:.4f} to {after.value:.4f}"
    return f"{before.metric} of {before.stage} {verb} {values}{rise}"
