"""How a run begins: the history of the state that it begins on, and all files that it needs.

A fork gets a copy of what its first state was computed from, an imported adapter becomes a link.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.schema import RunConfig
from chainlora.config.staging import stage_folder
from chainlora.data.kept import Kept, write_kept
from chainlora.models.identity import tokenizer_files
from chainlora.runs.history import (
    BASE,
    CONFIG,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Base,
    Entry,
    History,
    LinkFacts,
    State,
    Term,
    derived_file,
    link_folder,
    now,
    rows_file,
)
from chainlora.runs.links import save_link
from chainlora.runs.start import Start
from chainlora.runs.state import OpenState


def begun_history(run: Path, config: RunConfig, base: Base, start: Start, stage: str) -> History:
    """Return the history of a run that begins here, all that it needs written."""
    keys: dict[str, Any] = {"base": base, "hold": config.chain.hold, "seed": config.train.seed}
    if start.tokenizer is not None:
        keys["tokenizer"] = _copy_tokenizer(start.tokenizer, run)
    history = History(**keys)
    if start.state is not None:
        history = copy_closure(start.state, run, history)
    if start.adapter is not None:
        digest, facts = save_link(run, start.links[0], base, START)
        state = State(base=base.fingerprint, terms=(Term(link=digest),))
        imported = Entry(key=START, kind="import", state=state, tied=(digest,), ended=now())
        history = history.published(imported, {digest: facts})
        history = history.model_copy(update={"origin": START, "past": ()})
    if start.rows is not None:
        history = with_start_rows(history, save_rows(run, start.rows, stage))
    return history


def copy_closure(state: OpenState, run: Path, history: History) -> History:
    """Copy all that a state of another run needs into a run that begins on it, and nothing else.

    Returns the history with its entries.
    """
    entries = {entry.key: entry for entry in [*state.keepers(), *state.lineage]}
    links: dict[str, LinkFacts] = {}
    terms = [term for entry in entries.values() for term in entry.state.terms]
    for name in {derived_file(term.derived) for term in terms if term.derived is not None}:
        files.make_folder(run / "derived")
        shutil.copyfile(state.run / name, run / name)
    for entry in entries.values():
        for digest in (*(term.link for term in entry.state.terms), *entry.tied):
            if digest not in links:
                links[digest] = state.history.links[digest]
                _copy_folder(state.run, run, link_folder(digest))
        if entry.kept is not None:
            files.make_folder(run / "rows")
            shutil.copyfile(state.run / rows_file(entry.kept), run / rows_file(entry.kept))
        folder = stage_folder(run, entry.key)
        for name in _own_files(entry):
            files.make_folder(folder)
            source = stage_folder(state.run, entry.key) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)
    for folder in (run / "rows", run / "stages", run / "derived"):
        if folder.is_dir():
            files.sync_tree(folder)
    copied = [
        entry.model_copy(update={"files": {n: entry.files[n] for n in _own_files(entry)}})
        for entry in state.history.entries
        if entry.key in entries
    ]
    key = BASE if state.entry is None else state.entry.key
    update = {"entries": tuple(copied), "links": links, "head": key, "origin": key}
    return history.model_copy(update=update)


def _own_files(entry: Entry) -> list[str]:
    return [name for name in (CONFIG, RECORDS, RESULT) if name in entry.files]


def _copy_folder(source: Path, target: Path, name: str) -> None:
    files.make_folder((target / name).parent)
    with files.new_folder((target / name).parent, "copy") as scratch:
        shutil.copytree(source / name, scratch, dirs_exist_ok=True, copy_function=shutil.copyfile)
        files.put_folder(scratch, target / name)


def with_start_rows(history: History, kept: str) -> History:
    """Return a history that keeps rows for what the run began on, in place of earlier ones."""
    start = history.find(START)
    if start is not None:
        new = start.model_copy(update={"kept": kept})
        entries = tuple(new if entry.key == START else entry for entry in history.entries)
        return history.model_copy(update={"entries": entries})
    new = Entry(key=START, kind="import", state=history.empty, kept=kept, ended=now())
    update: dict[str, Any] = {"entries": (new, *history.entries)}
    if history.origin == history.head == BASE and not history.entries:
        update |= {"origin": START, "head": START}
    return history.model_copy(update=update)


def save_rows(run: Path, kept: Kept, stage: str) -> str:
    """Write the rows that a stage keeps into a run, named by their content; return their
    SHA-256."""
    files.make_folder(run / "rows")
    with files.new_folder(run / "rows", stage) as scratch:
        write_kept(scratch / "rows", kept)
        digest = files.sha256(scratch / "rows")
        (scratch / "rows").replace(run / rows_file(digest))
        files.sync_folder(run / "rows")
    return digest


def _copy_tokenizer(folder: Path, run: Path) -> dict[str, str]:
    with files.replaced_folder(run / TOKENIZER) as scratch:
        for path in tokenizer_files(folder):
            (scratch / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, scratch / path.relative_to(folder))
    return files.checksums(run / TOKENIZER)
