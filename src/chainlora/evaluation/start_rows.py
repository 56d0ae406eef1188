"""Build the entry `start`: import the adapter of a run's start, and keep rows for it.

A config names them as `start` and `start_data`. Without rows, the model writes some
(`general_rows`). `keep_start_rows` replaces the rows of a run that has begun.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.reading import make_config
from chainlora.config.schema import DataConfig, RunConfig, StartData
from chainlora.data.kept import Kept, keeps_general
from chainlora.data.splits import length_limit, prepare_splits
from chainlora.data.templates import set_chat_template
from chainlora.errors import RunError
from chainlora.evaluation.general_rows import general_rows
from chainlora.evaluation.stage_scores import Progress
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import open_run
from chainlora.runs.beginning import save_rows, with_start_rows
from chainlora.runs.changes import whole_run
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import (
    BASE,
    CONTENT,
    START,
    TOKENIZER,
    State,
    Term,
    Unbuilt,
    rows_file,
)
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.links import save_link
from chainlora.runs.loading_start import Start, fitted, load_start
from chainlora.runs.locks import Claim
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import noted_base, tokenizer_of


def rows_of_start(rows: StartData, data: DataConfig, tokenizer: Any, context: int) -> Kept:
    """Return the sample of start rows that a run keeps; `data` is that of its first stage.

    Raises DataError or ConfigError for rows that cannot be read.
    """
    return prepare_splits(rows.as_data(data), tokenizer, context).kept()


def build_start(
    run: Path, declared: Unbuilt, base: OpenBase | None = None, progress: Progress | None = None
) -> None:
    """Import the adapter of a run's start, and keep rows for it: given ones, or general rows.

    Raises ModelError for an adapter of another base, DataError for rows that cannot be read, and
    RunError if another process builds the entry.
    """
    config = make_config(declared.config)
    base = OpenBase.of_config(config, run).or_shared(base)
    claim = Claim(run, declared.unit)  # the lock of the first stage, which needs this entry
    claim.take()
    try:
        for folder in (run / name for name in CONTENT):
            files.remove_scratch(folder, START)  # left by a killed process
        if read_history(run).find(START) is None:
            _import(run, declared, config, base, progress or (lambda *done: None))
    finally:
        claim.release()


def _import(
    run: Path, declared: Unbuilt, config: RunConfig, base: OpenBase, progress: Progress
) -> None:
    """Write the links and the kept rows of the start, and give the entry its state."""
    history = read_history(run)
    is_adapter = history.origin == START and config.start is not None
    start = load_start(str(config.start)) if is_adapter else Start()
    chain = base.chain(seed=config.train.seed, hold=config.chain.hold)
    start = fitted(start, chain, config.model)
    base_facts = noted_base(config, chain, base.files)
    tokenizer = base.tokenizer(run / TOKENIZER if history.tokenizer else None)
    rows: Kept | None = None
    if isinstance(config.start_data, StartData):
        rows = rows_of_start(config.start_data, config.data, tokenizer, base.context)
    elif keeps_general(config):
        chain.add(*start.links)
        set_chat_template(tokenizer, config.data)
        longest, column = length_limit(config.data, base.context), START if start.links else BASE
        rows = general_rows(chain.model, tokenizer, longest, column, progress)
    kept = None if rows is None else save_rows(run, rows, START)
    links = dict(save_link(run, link, base_facts, START) for link in start.links)
    state = State(base=base_facts.fingerprint, terms=tuple(Term(link=digest) for digest in links))
    entry = declared.built(state, tied=tuple(links), kept=kept)
    update_history(
        run, lambda history: history.model_copy(update={"base": base_facts}).built(entry, links)
    )


def keep_start_rows(run: str | Path, rows: StartData) -> None:
    """Replace the kept rows of a run's start.

    Raises RunError for a saved chain, and for a run with an unfinished stage.
    """
    run = whole_run(run)
    state = open_run(run)
    if not state.has_run:
        rule = "only a run can keep rows of its start"
        raise RunError(rule, f"a saved chain, {run}", "begin a run on it, with start_data")
    if begun := drafts_in(run, state.history):
        rule = "Cannot replace the rows of the start while a stage is unfinished"
        got = next(iter(begun.values()))
        raise RunError(rule, got, "finish that stage: repeat the command that began it")
    base = resolve_model(state.base.model)
    tokenizer, context = tokenizer_of(state, base), context_length(load_skeleton(base))
    sample = rows_of_start(rows, state.with_rows.config().data, tokenizer, context)
    kept = save_rows(run, sample, START)
    before = state.history
    after = update_history(run, lambda history: with_start_rows(history, kept))
    named = {entry.kept for entry in after.entries}
    for replaced in {entry.kept for entry in before.entries if entry.kept not in named}:
        files.remove(run / rows_file(str(replaced)))
