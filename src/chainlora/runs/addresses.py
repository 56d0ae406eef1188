"""Addresses: from ``RUN``, ``RUN@NAME`` or a state itself to the state that a command is about.

``RUN`` is what the run is now, ``RUN@STAGE`` the end of a stage (or another entry of `chainlora
log`, by its name or the first digits of its digest), ``RUN@start`` what the run began on, and
``RUN@base`` the model without links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from chainlora.errors import RunError
from chainlora.runs.documents import DAMAGED
from chainlora.runs.draft import DRAFT, drafts_in, read_draft
from chainlora.runs.history import BASE, CONFIG, START, History
from chainlora.runs.history_file import read_history
from chainlora.runs.paths import HISTORY, exists_in, need_run, split_address
from chainlora.runs.state import OpenState

_SHORTEST = 4  # digits of a digest that name a state

Address = str | Path | OpenState
"""What names a state: ``RUN``, ``RUN@NAME``, or the state itself."""


def open_run(
    address: Address, stages: str | Sequence[str] | Mapping[str, float] | None = None
) -> OpenState:
    """Return the state that an address names; all that loads, scores or exports takes it too.

    Args:
        address: a run, as it is now, ``RUN@STAGE``, ``RUN@start`` or ``RUN@base``.
        stages: the stages that are switched on, or the strength of each; the others are off.

    Raises:
        RunError: no run, a stage that is not there, or that has no one strength.
    """
    found = address if isinstance(address, OpenState) else _found(address)
    if stages is None:
        return found
    named = [stages] if isinstance(stages, str) else stages
    chosen = named if isinstance(named, Mapping) else dict.fromkeys(named, 1.0)
    on = found.with_strengths(chosen)
    found.need_one_strength([name for name, value in chosen.items() if value])
    return on.with_strengths({name: 0.0 for name in found.stages if name not in chosen})


def _found(address: str | Path) -> OpenState:
    need_run(address)
    run, name = split_address(address)
    history = read_history(run)
    if name is not None:
        return state_at(run, history, name)
    drafts = {} if history.own else drafts_in(run, history)
    return state_of_draft(run, next(iter(drafts)), history) if drafts else state_at(run, history)


def state_at(run: Path, history: History, name: str | None = None) -> OpenState:
    """Return the state of an entry by its name or the first digits of its digest; by default the
    head. Raises RunError for one that is not there."""
    key = history.head if name is None else history.origin if name == START else name
    entry = history.find(key)
    if entry is None and len(key) >= _SHORTEST:
        found = {e.state.digest: e for e in history.entries if e.state.digest.startswith(key)}
        entry = next(iter(found.values())) if len(found) == 1 else None
    if entry is None and key != BASE:
        raise _no_such(run, history, key)
    return OpenState(run, history, history.empty if entry is None else entry.state, entry)


def state_of_draft(run: Path, stage: str, history: History | None = None) -> OpenState:
    """Return what a stage that is trained has tied so far."""
    history, draft = history or read_history(run), read_draft(run, stage)
    declared = history.find_unbuilt(stage)
    if declared is None or history.below(declared.parent) & {e.key for e in history.unbuilt}:
        raise RunError(f"{DRAFT} must be of its run", f"{stage} in {run}", DAMAGED)
    sums = {name: digest for name, digest in draft.files.items() if name == CONFIG}
    entry = draft.entry(declared, history, draft.tied, files=sums, ended="")
    grown = history.added(entry, draft.links)
    try:
        grown.need_names()
    except ValueError as error:
        raise RunError(f"{DRAFT} must be of its run", f"{error} in {run}", DAMAGED) from None
    return OpenState(run, grown, entry.state, entry, draft)


def begun_stage(run: Path, name: str, history: History | None = None) -> OpenState | None:
    """Return a stage that was begun, ended or not; None where there is none."""
    if history is None and not exists_in(run):
        return None
    history = history or read_history(run)
    if history.find(name) is not None:
        return state_at(run, history, name)
    return state_of_draft(run, name, history) if name in drafts_in(run, history) else None


def _no_such(run: Path, history: History, name: str) -> RunError:
    names = [entry.key for entry in history.entries if entry.kind != "mix"]
    begun = ", which has not ended," if history.find_unbuilt(name) is not None else ""
    return RunError(
        f"a stage must be one of {', '.join(names) or BASE}",
        f"{name!r}{begun} for {run}",
        f"name one; chainlora log {run} shows all states",
    )


def nothing_at(address: object, what: str) -> RunError:
    """Return the error for a name that is neither a run nor `what`, on this machine or the Hub."""
    run, _, stage = str(address).rpartition("@")
    run = run or stage
    return RunError(
        f"a run or {what} must be there",
        f"{address}: no {run}/{HISTORY}, no such {what} on this machine, and none on the Hub "
        "or in its cache",
        "check the path, or for the Hub the connection, HF_HUB_OFFLINE and `hf auth login`",
    )
