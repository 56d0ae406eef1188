"""How a run and its stages begin: the history of the state that a run begins on, and all files that
it needs; the entry of a stage.

A fork gets a copy of what its first state was computed from, an imported adapter becomes a link.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.schema import RunConfig
from chainlora.config.staging import HISTORY, RUN_WIDE, exists_in, is_name
from chainlora.data.kept import Kept, write_kept
from chainlora.errors import RunError
from chainlora.models.identity import tokenizer_files
from chainlora.registry import plugin_digest
from chainlora.runs.documents import need_file, now, write_part
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import (
    BASE,
    CONFIG,
    CONTENT,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Base,
    Entry,
    History,
    State,
    Term,
    Training,
    read_history,
    rows_file,
    update_history,
)
from chainlora.runs.links import save_link
from chainlora.runs.resuming import source_digests
from chainlora.runs.start import Start
from chainlora.runs.state import OpenState


def begun_history(run: Path, config: RunConfig, base: Base, start: Start, stage: str) -> History:
    """Return the history of a run that begins here, all that it needs written."""
    tokenizer = {} if start.tokenizer is None else _copy_tokenizer(start.tokenizer, run)
    hold, seed = config.chain.hold, config.train.seed
    history = History(base=base, hold=hold, seed=seed, tokenizer=tokenizer)
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


def begun_entry(
    history: History,
    config: RunConfig,
    on: OpenState | None,
    stage: str,
    *,
    rows: str,
    kept: str | None,
) -> Entry:
    """Return the entry of a stage that begins `on` a state of its run, or on the run's origin.

    It has no links of its own yet. `rows` is the digest of its rows. It `reads` the rows that
    entries below it kept: what they held out is left out of its own rows.
    """
    parent, state = history.origin, history.state_of(history.origin)
    if on is not None:
        parent, state = on.key, on.state
    return Entry(
        key=stage,
        kind="stage",
        parents=() if parent == BASE else (parent,),
        reads=tuple(history.keepers([parent])),
        state=state,
        kept=kept,
        training=Training(
            rows=rows,
            sources=source_digests(config),
            plugins={name: plugin_digest(name) for name in config.plugins},
        ),
    )


def need_unmoved(run: Path, known: History | None, entry: Entry) -> None:
    """Raise RunError where a run has changed, since it was `known`, below a stage that begins."""
    if not exists_in(run):
        return
    if known is None or read_history(run).state_of(entry.parent) != entry.state:
        rule = "what a stage begins on must stay as it is"
        raise RunError(rule, f"another {run} now", "give the same command again")


def closure(state: OpenState) -> History:
    """Return the history of a state alone: the entries that it needs, with their links."""
    due = {*state.keepers, *(entry.key for entry in state.lineage)}
    found = _part(state.history, [e for e in state.history.entries if e.key in due])
    moves = {"head": state.key, "origin": state.key, "past": (), "future": ()}
    return found.model_copy(update=moves)


def _part(history: History, entries: Sequence[Entry]) -> History:
    """Return a history of some entries, with their links."""
    digests = (d for e in entries for d in (*(term.link for term in e.state.terms), *e.tied))
    links = {digest: history.links[digest] for digest in digests}
    return history.model_copy(update={"entries": tuple(entries), "links": links})


def copy_closure(state: OpenState, run: Path, history: History) -> History:
    """Copy all that a state of another run needs into a run that begins on it, and nothing else.

    Returns the history with its entries.
    """
    found = closure(state)
    entries = tuple(map(_own, found.entries))
    copy_files(state.run, run, found.model_copy(update={"entries": entries, "tokenizer": {}}))
    update = {"entries": entries, "links": found.links, "head": found.head, "origin": found.head}
    return history.model_copy(update=update)


def fork(state: OpenState, folder: Path) -> None:
    """Write a run that is in a state of another one; the other is not needed any more."""
    update = {"base": state.base, "past": (), "future": ()}
    history = state.history.model_copy(update=update)
    if (own := state.tokenizer()) is not None:
        _copy_tokenizer(own, folder)
    history = copy_closure(state, folder, history)
    origin = START if history.find(START) is not None else BASE
    write_part(folder / HISTORY, history.model_copy(update={"origin": origin}))


def need_same_base(own: OpenState, state: OpenState) -> None:
    """Raise RunError where a state of another run cannot be combined with that of a run."""
    history, other = own.history, state.history
    data, others = own.config().data, state.config().data
    differing = [
        name
        for name, here, there in (
            ("base model", history.empty.base, other.empty.base),
            ("train.dtype", history.base.dtype, other.base.dtype),  # of one digest, too
            ("quantize", history.base.quantize, other.base.quantize),
            ("tokenizer", _own_tokenizer(history), _own_tokenizer(other)),
            ("chain.hold", history.hold, other.hold),
            *(
                (f"data.{key}", getattr(data, key), getattr(others, key))
                for key in RUN_WIDE["data"]
            ),
        )
        if here != there
    ]
    if differing:
        rule = "runs that are combined must share their base, its precision and the chat template"
        raise RunError(rule, f"another {differing[0]} in {state.run}", "train one of them again")


def _own_tokenizer(history: History) -> dict[str, str]:
    """Return the files of a tokenizer that is not the base's; an adapter may come with that."""
    is_of_base = history.tokenizer.items() <= (history.base.files or {}).items()
    return {} if is_of_base else history.tokenizer


def take_in(run: Path, state: OpenState) -> str:
    """Copy a state of another run, and what it was computed from, beside the entries of a run.

    Returns the name of its entry there: its own, or that of the other run's folder where a stage of
    this run has the name.
    """
    history, other = read_history(run), state.history
    state.verify()
    names: dict[str, str] = {}
    for entry in state.lineage:
        names[entry.key] = _name_there(entry, history, run, state.run, names)
    new = [_own(entry) for entry in state.lineage if history.find(names[entry.key]) is None]
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


def _name_there(
    entry: Entry, history: History, run: Path, other: Path, taken: Mapping[str, str]
) -> str:
    """Return the name that an entry of another run gets, or has where it is there already.

    Raises RunError for a stage of this run in another state: a copy of which other links were
    pruned. A link is of one stage.
    """
    for each in history.entries if entry.tied else ():
        if (each.kind, each.state, each.tied) == (entry.kind, entry.state, entry.tied):
            return each.key
        if {*each.tied} & {*entry.tied}:
            raise RunError(
                "runs that are combined must hold a stage in one state",
                f"{each.key} in {run} and {entry.key} in {other}, of which others were pruned",
                "prune the same stages in both",
            )
    known = history.find(entry.key)
    is_there = known is not None and (known.kind, known.state) == (entry.kind, entry.state)
    if known is not None and is_there and (entry.key != START or known.kept == entry.kept):
        return entry.key
    used = {START, *taken.values(), *(each.key for each in history.entries)}
    used |= drafts_in(run, history).keys()
    names = chain([entry.key, other.resolve().name], (f"{entry.key}-{k}" for k in count(2)))
    return next(name for name in names if is_name(name) and name not in used)


def _own(entry: Entry) -> Entry:
    """Return an entry with the files that go with it into another run."""
    names = [name for name in (CONFIG, RECORDS, RESULT) if name in entry.files]
    return entry.model_copy(update={"files": {name: entry.files[name] for name in names}})


def copy_files(
    source: Path,
    target: Path,
    history: History,
    there: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Copy what a history names from one run into another, each file checked; return the files.

    `there` are files that the other run names, each with its SHA-256, and `names` are those that
    entries get in it.
    """
    copied = []
    for name, digest in history.files.items():
        kind, key, *rest = name.split("/")
        own = "/".join((kind, (names or {}).get(key, key) if kind == "stages" else key, *rest))
        is_known = kind in CONTENT and (target / own).is_file()  # by its name
        is_gone = rest == [RECORDS] and not (source / name).is_file()  # which records may be
        if is_known or is_gone or (there or {}).get(own) == digest:
            continue
        files.copy_file(need_file(source, name, digest), target / own)
        copied.append(name)
    return copied


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
    """Write rows that a stage keeps into a run, named by their SHA-256, and return that."""
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
