"""Copy a state, its ancestors and their files into another run.

A fork begins with such a copy; a combination with stages of other runs takes them in.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.staging import RUN_WIDE, is_name
from chainlora.data.kept import Kept, write_kept
from chainlora.errors import RunError
from chainlora.models.finding import resolve_model
from chainlora.models.identity import tokenizer_files
from chainlora.models.loading import are_same_tokenizers, load_tokenizer
from chainlora.runs.documents import need_file, now, write_part
from chainlora.runs.history import (
    BASE,
    CONFIG,
    CONTENT,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Entry,
    History,
    rows_file,
)
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.paths import HISTORY
from chainlora.runs.state import OpenState


def closure(state: OpenState) -> History:
    """Return the history of a state alone: its entry, the ancestors, and their links."""
    needed = {*state.keepers, *(entry.key for entry in state.lineage)}
    part = _part(state.history, [e for e in state.history.entries if e.key in needed])
    moves = {"head": state.key, "origin": state.key, "past": (), "future": (), "target": None}
    return part.model_copy(update={**moves, "unbuilt": ()})


def _part(history: History, entries: Sequence[Entry]) -> History:
    """Return a history with some entries only, and their links."""
    digests = (d for e in entries for d in (*e.state.links, *e.tied))
    links = {digest: history.links[digest] for digest in digests}
    return history.model_copy(update={"entries": tuple(entries), "links": links})


def own_closure(state: OpenState) -> History:
    """Return the history of a state alone, with the files that another run gets."""
    part = closure(state)
    entries = tuple(map(_with_copied_files, part.entries))
    return part.model_copy(update={"entries": entries, "tokenizer": {}})


def fork(state: OpenState, folder: Path) -> None:
    """Write a new run with a state of another one as its head; copy all files it needs."""
    history = own_closure(state)
    origin = START if history.find(START) is not None else BASE
    update: dict[str, Any] = {"base": state.base, "origin": origin}
    if (tokenizer := state.tokenizer()) is not None:
        update["tokenizer"] = copy_tokenizer(tokenizer, folder)
    copy_files(state.run, folder, history)
    write_part(folder / HISTORY, history.model_copy(update=update))


def need_same_base(own: OpenState, state: OpenState) -> None:
    """Raise RunError unless a state has base, precision, tokenizer and chat template of `own`."""
    history, other = own.history, state.history
    data, others = own.config().data, state.config().data
    differing = [
        name
        for name, here, there in (
            ("base model", history.empty.base, other.empty.base),
            ("train.dtype", history.base.dtype, other.base.dtype),  # the digest does not cover it
            ("quantize", history.base.quantize, other.base.quantize),
            ("chain.hold", history.hold, other.hold),
            *(
                (f"data.{key}", getattr(data, key), getattr(others, key))
                for key in RUN_WIDE["data"]
            ),
        )
        if here != there
    ]
    if not differing and not _have_same_tokenizer(own, state):
        differing = ["tokenizer"]
    if differing:
        rule = "such runs must share their base, its precision and the chat template"
        raise RunError(rule, f"another {differing[0]} in {state.run}", "train one of them again")


def _have_same_tokenizer(own: OpenState, state: OpenState) -> bool:
    """Compare the tokenizers of two runs on one base: their files, or else what they give."""
    if own.history.tokenizer == state.history.tokenizer:
        return True
    # the bases are equal, and that of another person's run may be in no such place here
    folders = [run.tokenizer() or resolve_model(own.base.model) for run in (own, state)]
    return are_same_tokenizers(*map(load_tokenizer, folders))


def take_in(run: Path, state: OpenState) -> str:
    """Copy a state of another run and its ancestors into a run; return the new name of its entry.

    An entry keeps its name if it is free. Otherwise it gets the name of the other run's folder.
    """
    history, other = read_history(run), state.history
    state.verify()
    names: dict[str, str] = {}
    for entry in state.lineage:
        names[entry.key] = _new_name(entry, history, run, state.run, names)
    new = [
        _with_copied_files(entry)
        for entry in state.lineage
        if history.find(names[entry.key]) is None
    ]
    part = _part(other, new).model_copy(update={"tokenizer": {}})
    copy_files(state.run, run, part, names=names)

    def change(history: History) -> History:
        entries = (entry.renamed(names) for entry in new)
        renamed = {
            digest: facts.model_copy(update={"stage": names.get(facts.stage, facts.stage)})
            for digest, facts in part.links.items()
        }
        update = {"entries": (*history.entries, *entries), "links": {**renamed, **history.links}}
        return history.model_copy(update=update)

    update_history(run, change)
    return names[state.key]


def _new_name(
    entry: Entry, history: History, run: Path, other: Path, taken: Mapping[str, str]
) -> str:
    """Return the name that an entry of another run gets in this run, or has there already.

    Raises RunError if this run has the same stage in another state, because other stages below it
    were pruned: a link can belong to one stage only.
    """
    for known in history.entries if entry.tied else ():
        if (known.kind, known.state, known.tied) == (entry.kind, entry.state, entry.tied):
            return known.key
        if {*known.tied} & {*entry.tied}:
            raise RunError(
                "combined runs must hold a stage in one state",
                f"{known.key} in {run} and {entry.key} in {other}, below which others were pruned",
                "prune the same stages in both",
            )
    same = history.find(entry.key)
    is_equal = same is not None and (same.kind, same.state) == (entry.kind, entry.state)
    is_base = not entry.state.links  # then this run may have rows of its own for it
    has_rows = is_base or entry.key != START or (same is not None and same.kept == entry.kept)
    if is_equal and has_rows:
        return entry.key
    used = {START, *taken.values(), *(known.key for known in history.entries)}
    used |= {unbuilt.key for unbuilt in history.unbuilt}
    folder = other.resolve().name + f"-{entry.key}" * is_base
    names = chain([entry.key, folder], (f"{entry.key}-{k}" for k in count(2)))
    return next(name for name in names if is_name(name) and name not in used)


def _with_copied_files(entry: Entry) -> Entry:
    """Return an entry with only the files that are copied into another run."""
    names = [name for name in (CONFIG, RECORDS, RESULT) if name in entry.files]
    return entry.model_copy(update={"files": {name: entry.files[name] for name in names}})


def copy_files(
    source: Path,
    target: Path,
    history: History,
    existing: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Copy the files that a history names from one run into another, checked; return their names.

    `existing` are files that the target has, each with its SHA-256. `names` are new names of
    entries in the target.
    """
    copied = []
    for name, digest in history.files.items():
        kind, key, *rest = name.split("/")
        new = "/".join((kind, (names or {}).get(key, key) if kind == "stages" else key, *rest))
        is_known = kind in CONTENT and (target / new).is_file()
        is_known = is_known and files.sha256(target / new).startswith(digest)
        is_gone = rest == [RECORDS] and not (source / name).is_file()  # records may be missing
        if is_known or is_gone or (existing or {}).get(new) == digest:
            continue
        files.copy_file(need_file(source, name, digest), target / new)
        copied.append(name)
    return copied


def with_start_rows(history: History, kept: str) -> History:
    """Return a history whose entry ``start`` has these kept rows, in place of earlier ones."""
    start = history.find(START)
    if start is not None:
        new = start.model_copy(update={"kept": kept})
        entries = tuple(new if entry.key == START else entry for entry in history.entries)
        return history.model_copy(update={"entries": entries})
    new = Entry(key=START, kind="import", state=history.empty, kept=kept, ended=now())
    if history.origin == history.head == BASE and not history.entries:
        history = history.model_copy(update={"origin": START})
    return history.built(new, {})


def save_rows(run: Path, kept: Kept, stage: str) -> str:
    """Write kept rows of a stage into a run, named by their SHA-256; return the SHA-256."""
    files.make_folder(run / "rows")
    with files.new_folder(run / "rows", stage) as scratch:
        write_kept(scratch / "rows", kept)
        digest = files.sha256(scratch / "rows")
        (scratch / "rows").replace(run / rows_file(digest))
        files.sync_folder(run / "rows")
    return digest


def copy_tokenizer(folder: Path, run: Path) -> dict[str, str]:
    """Copy the files of a tokenizer into a run; return their checksums."""
    with files.replaced_folder(run / TOKENIZER) as scratch:
        for path in tokenizer_files(folder):
            (scratch / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, scratch / path.relative_to(folder))
    return files.checksums(run / TOKENIZER)
