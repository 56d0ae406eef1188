"""Find the state at an address: ``RUN``, ``RUN@NAME``, or a state itself.

``RUN`` is the head of the run. ``RUN@STAGE`` is the end of a stage, or another entry of `chainlora
log`, by its name or the first digits of its digest. ``RUN@base`` is the model without links, as is
``RUN@start``.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from chainlora.errors import RunError
from chainlora.runs.documents import DAMAGED
from chainlora.runs.draft import DRAFT, drafts_in, read_draft
from chainlora.runs.entries import BASE, CONFIG, START
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.paths import HISTORY, exists_in, need_run, split_address, stage_folder
from chainlora.runs.state import OpenState

_SHORTEST = 4  # digits of a digest, at least, to name a state

Address = str | Path | OpenState
"""A state, or its name: ``RUN`` or ``RUN@NAME``."""


def open_run(address: Address) -> OpenState:
    """Return the state at an address. Functions that load, score or export accept it.

    Args:
        address: the head of ``RUN``, or ``RUN@STAGE``, ``RUN@start`` or ``RUN@base``. A run in its
            first stage is that stage so far.

    Returns:
        The state, frozen; its files are checked when they are read.

    Raises:
        RunError: no run, or an unknown stage.
    """
    if isinstance(address, OpenState):
        return address
    need_run(address)
    run, name = split_address(address)
    history = read_history(run)
    has_stage = any(entry.key != START for entry in history.entries)
    drafts = {} if has_stage else drafts_in(run, history)
    if drafts and name in (None, BASE, START):
        state = state_of_draft(run, next(iter(drafts)), history)
        return state if name is None else state_at(run, state.history, name)
    return state_at(run, history, name)


def state_at(run: Path, history: History, name: str | None = None) -> OpenState:
    """Return the state of an entry, by its name or the first digits of its digest.

    By default it is the state of the head. Raises RunError for an unknown name.
    """
    key = history.head if name is None else name
    entry = history.find(key)
    if entry is None and len(key) >= _SHORTEST:
        states = {e.state.digest: e for e in history.entries if e.state.digest.startswith(key)}
        entry = next(iter(states.values())) if len(states) == 1 else None
    if entry is None and key not in (BASE, START):
        names = ", ".join(e.key for e in history.entries) or BASE
        place, unbuilt = shlex.quote(str(run)), ""
        remedy = f"name one; chainlora log {place} shows all states"
        if key in history.plan().names:
            unbuilt, remedy = ", which has not ended,", f"chainlora train {place} finishes it"
        raise RunError(f"a stage must be one of {names}", f"{key!r}{unbuilt} for {run}", remedy)
    return OpenState(run, history, history.empty if entry is None else entry.state, entry)


def state_of_draft(run: Path, stage: str, history: History | None = None) -> OpenState:
    """Return the state of a stage in training. Raises RunError if ``stage.json`` does not fit."""
    history = history or read_history(run)
    draft, due = read_draft(stage_folder(run, history.folder_of(stage))), history.due_stage(stage)
    if due is None or due.digest != draft.digest:
        raise RunError(f"{DRAFT} must be of its run", f"{stage} in {run}", DAMAGED)
    sums = {name: digest for name, digest in draft.files.items() if name == CONFIG}
    entry = draft.entry(due, draft.tied, files=sums, ended="")
    history = history.added(entry, draft.links)
    try:
        history.need_names()
    except ValueError as error:
        raise RunError(f"{DRAFT} must be of its run", f"{error} in {run}", DAMAGED) from None
    return OpenState(run, history, entry.state, entry, draft)


def begun_stage(run: Path, name: str, history: History | None = None) -> OpenState | None:
    """Return the state of a finished stage, or of one in training; None if it was not begun."""
    if history is None and not exists_in(run):
        return None
    history = history or read_history(run)
    if history.find(name) is not None:
        return state_at(run, history, name)
    return state_of_draft(run, name, history) if name in drafts_in(run, history) else None


def nothing_at(address: object, what: str) -> RunError:
    """Return the error for a name that is neither a run nor `what` (model, adapter, repository)."""
    run, _, stage = str(address).rpartition("@")
    run = run or stage
    return RunError(
        f"a run or {what} must be there",
        f"{address}: no {run}/{HISTORY}, no such {what} on this machine, and none on the Hub "
        "or in its cache",
        "check the path, or for the Hub the connection, HF_HUB_OFFLINE and `hf auth login`",
    )
