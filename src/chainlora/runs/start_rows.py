"""Rows for what a run began on: they are kept as those of an entry named `start`.

A config gives them as `start_data`, and the run then keeps them when it begins; to a run that has
begun they are given by `keep_start_rows`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.schema import DataConfig, StartData
from chainlora.data.kept import Kept
from chainlora.data.splits import prepare_splits
from chainlora.errors import RunError
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import open_run
from chainlora.runs.beginning import save_rows, with_start_rows
from chainlora.runs.changes import whole_run
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import START, rows_file, update_history
from chainlora.runs.opening import tokenizer_of


def rows_of_start(rows: StartData, own: DataConfig, tokenizer: Any, context: int) -> Kept:
    """Return what a run keeps of rows for its start; `own` are those of its first stage.

    Raises DataError or ConfigError for rows that cannot be read.
    """
    return prepare_splits(rows.as_data(own), tokenizer, context).kept()


def keep_start_rows(run: str | Path, rows: StartData) -> None:
    """Keep rows for what a run began on, in place of those that it has.

    Raises RunError for a saved chain, and for a run that has a half-trained stage.
    """
    run = whole_run(run)
    state = open_run(run)
    if not state.has_run:
        rule = "rows for the start are kept by a run"
        raise RunError(rule, f"a saved chain, {run}", "begin a run on it, with start_data")
    if begun := drafts_in(run, state.history):
        rule = "a run can be given rows for its start when no stage is half trained"
        got = next(iter(begun.values()))
        raise RunError(rule, got, "finish it by the command that began it")
    base = resolve_model(state.base.model)
    tokenizer, context = tokenizer_of(state, base), context_length(load_skeleton(base))
    own = rows_of_start(rows, state.with_rows.config().data, tokenizer, context)
    kept = save_rows(run, own, START)
    before, after = state.history, update_history(run, lambda each: with_start_rows(each, kept))
    named = {entry.kept for entry in after.entries}
    for gone in {entry.kept for entry in before.entries if entry.kept not in named}:
        files.remove(run / rows_file(str(gone)))
