"""Certificates of erasure: what an update with `purge` deleted, and what can be checked of it.

    FILE.json       the certificate (`Certificate`), outside the run
    FILE.md         the same for readers
    FILE.json.pending   while the update is not finished: what the run was before

A certificate is not signed. It says what the run held before and after, by digests, and what it
does not show. `verify_certificate` compares it with a run, and searches the run for removed rows.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from chainlora import files
from chainlora.data.kept import SPLITS
from chainlora.data.mixture import example_hashes
from chainlora.data.row_warnings import without_warnings
from chainlora.data.sources import find_source
from chainlora.data.splits import prepare_splits
from chainlora.errors import ChainLoRAError, RunError
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import whole_run
from chainlora.runs.costs import versions
from chainlora.runs.declaring import config_of
from chainlora.runs.documents import (
    Digest,
    Document,
    Part,
    now,
    read_part,
    short_digest,
    write_part,
)
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.open_base import OpenBase
from chainlora.runs.sent import Sent, sent_from
from chainlora.runs.state import OpenState

NOT_SHOWN = (
    "Copies of the run, exports and backups elsewhere are not changed; those that the run knows of "
    "are listed, and must be deleted by hand.",
    "The row files themselves are not read again by the check; the run was trained on their "
    "contents at the time, by the digests in its plan.",
    "What the base model knew before any training is not changed.",
    "Other data sets may say the same as a removed row.",
    "The disk may still hold deleted blocks.",
    "The certificate is not signed: whoever holds the run could write another one.",
)


Hashes = NDArray[np.int64]  # of rows


class Counts(Part):
    """The numbers of training rows of a stage before and after; None: not known."""

    before: int | None = None
    after: int | None = None
    removed: int | None = None


class Held(Part):
    """What a run holds: its state, its plan, and the SHA-256 of its files, or the first digits."""

    state: Digest
    plan: Digest
    files: dict[str, str] = Field(default={})


class Certificate(Document):
    """The content of a certificate; without `after`, the update is not finished."""

    remedy = "the certificate was changed since it was written"

    run: str
    time: str
    stages: dict[str, Counts]
    before: Held
    after: Held | None = None
    sent: tuple[Sent, ...] = ()  # exports and copies of states that the run does not hold any more
    versions: dict[str, str] = Field(default={})
    machine: str = ""
    not_shown: tuple[str, ...] = NOT_SHOWN


def _held(history: History) -> Held:
    plan = [stage.identity for stage in history.plan().stages]
    state = history.state_of(history.head).digest
    return Held(state=state, plan=short_digest(plan), files=dict(sorted(history.files.items())))


def _pending(place: Path) -> Path:
    return place.with_name(f"{place.name}.pending")


def certificate_place(run: Path, given: str | Path | None) -> Path:
    """Return where a certificate is written: outside the run, in a ``.json``. Raises RunError."""
    place = Path(given).expanduser() if given else run.with_name(f"{run.name}-certificate.json")
    if run.resolve() in place.resolve().parents:
        raise RunError("a certificate lies outside its run", place, "name another place")
    if place.suffix != ".json":  # the page beside it ends in .md
        raise RunError("a certificate is a .json file", place, "name one")
    return place


def begin_certificate(
    place: Path, run: Path, before: History, counts: Mapping[str, Counts], *, again: bool = False
) -> None:
    """Write what a run holds before an update, unless the same update was stopped (`again`).

    Raises RunError if a certificate is there already.
    """
    if taken := [path for path in (place, place.with_suffix(".md")) if path.exists()]:
        raise RunError(f"Cannot write {taken[0]}: it exists. Name another by --certificate.")
    if again and _pending(place).exists():
        return
    known: dict[str, Any] = {"run": run.resolve().name, "time": now(), "stages": dict(counts)}
    part = Certificate(**known, before=_held(before))
    write_part(_pending(place), part)


def finish_certificate(place: Path, run: Path) -> None:
    """Write the certificate of an update that has ended, and its page; do nothing without one."""
    if not _pending(place).exists():
        return
    history = read_history(run)
    states = {history.empty.digest, *(entry.state.digest for entry in history.entries)}
    update = {
        "time": now(),
        "after": _held(history),
        "sent": tuple(each for each in sent_from(run) if each.state not in states),
        "versions": versions(),
        "machine": platform.platform(),
    }
    certificate = read_part(_pending(place), Certificate).model_copy(update=update)
    files.write_text(place.with_suffix(".md"), page_of(certificate))
    write_part(place, certificate, indent=1)
    files.remove(_pending(place))
    for path in (place, _pending(place), place.with_suffix(".md")):  # left by a kill
        files.remove_scratch(place.parent, path.name)


def page_of(certificate: Certificate) -> str:
    """Return a certificate as Markdown."""
    rows = [
        f"| {name} | {_text(c.before)} | {_text(c.removed)} | {_text(c.after)} |"
        for name, c in certificate.stages.items()
    ]
    before, after = certificate.before, certificate.after
    gone = [name for name in before.files if after is not None and name not in after.files]
    sent = [f"- {each.what} to `{each.to}` on {each.time}" for each in certificate.sent]
    lines = [
        f"# Certificate of erasure: {certificate.run}",
        "",
        f"Written {certificate.time} (UTC) by `chainlora update --purge`.",
        "",
        "These data sets were trained again on their files without the removed rows. Everything "
        "that was computed from the former files was deleted from the run.",
        "",
        "| data set | rows before | removed | rows now |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        f"State before: `{before.state}`. State now: `{after and after.state}`.",
        f"{len(gone)} files were deleted. {after and len(after.files)} files are left; the JSON "
        "file beside this page has the SHA-256 of each.",
        "",
        "## Exports and copies to delete by hand",
        "",
        *(sent or ["None known."]),
        "",
        "## How to check",
        "",
        "`chainlora verify RUN --certificate FILE --rows REMOVED.jsonl` compares the run with the "
        "digests, and searches it for the removed rows: as text, as tokens and as hashes.",
        "",
        "## What this does not show",
        "",
        *(f"- {line}" for line in certificate.not_shown),
    ]
    return "\n".join(lines) + "\n"


def _text(count: int | None) -> str:
    return "not known" if count is None else str(count)


# --- verify ---


def verify_certificate(
    run: str | Path, certificate: str | Path, rows: str | Path | None = None
) -> list[str]:
    """Compare a run with a certificate, and search it for removed rows.

    Args:
        run: the run.
        certificate: the JSON file of `update` with `purge`.
        rows: a file of the removed rows, with the columns that the stages read.

    Returns:
        The differences, one line each: a state or a file that is not as it was certified, a deleted
        file that is there again, another number of rows, and removed rows that the run holds.

    Raises:
        RunError: a certificate that was changed since it was written, or an unfinished one.
        DataError: rows that no stage can read.
    """
    folder = whole_run(run)
    state, document = open_run(folder), read_part(Path(certificate).expanduser(), Certificate)
    if document.after is None:
        rule = "a certificate must be of a finished update"
        raise RunError(rule, certificate, "repeat chainlora update --purge")
    differences = [*_other_products(state, document.before, document.after)]
    if rows is not None:
        read = _encodings(state, rows)
        removed = [counts.removed for counts in document.stages.values()]
        given = len(np.unique(read[0]))  # a row that is there twice was counted once
        if None not in removed and given != sum(map(int, filter(None, removed))):
            told = " + ".join(map(str, removed))
            differences.append(f"{rows} has {given} different rows, and {told} were removed")
        differences += [*_texts_in(state.run, rows), *_hashes_in(state, read, rows)]
    return differences


def _other_products(state: OpenState, before: Held, after: Held) -> Iterator[str]:
    """Yield how the files of a run differ from a certificate."""
    history, run = state.history, state.run
    states = {history.empty.digest, *(entry.state.digest for entry in history.entries)}
    if after.state not in states:
        yield f"{run} has no state {after.state}"
    if history.versions[history.at].marks:
        yield f"{run} has not deleted what was marked: chainlora train {run} ends it"
    now = files.checksums(run)
    for name, digest in after.files.items():
        if name not in now:
            yield f"{name} is gone"
        elif not now[name].startswith(digest):
            yield f"{name} has other bytes"
    former = {name: digest for name, digest in before.files.items() if name not in after.files}
    gone = tuple({*former.values()} - {*after.files.values()})
    for name, digest in now.items():
        if name in former or digest.startswith(gone):
            yield f"{name} was deleted, and is there again"


def _encodings(state: OpenState, rows: str | Path) -> list[Hashes]:
    """Return the hashes of rows, as each stage would read them. Raises DataError if none can."""
    base, read, error = OpenBase.of_state(state), list[Hashes](), None
    for stage in state.history.plan().stages:
        config = config_of(state.run, stage)
        update: dict[str, Any] = {"train": str(rows), "validation": None, "test": None}
        update |= {"replay": None, "new_rows_only": False}
        data = config.data.model_copy(update=update)
        try:
            own, loss = base.tokenizer(state.tokenizer()), config.train.loss
            with without_warnings():
                splits = prepare_splits(data, own, base.context, loss=loss, compare=False)
        except ChainLoRAError as refused:  # such as rows of another stage, with other columns
            error = refused
        else:
            read.append(example_hashes(splits.own))
    if not read and error is not None:
        raise error
    return read


def _texts_in(run: Path, rows: str | Path) -> Iterator[str]:
    """Yield the files of a run that hold all texts of a row."""
    values = [[str(v) for v in dict(row).values() if len(str(v)) > 3] for row in find_source(rows)]
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for number, texts in enumerate(values, 1):
            if texts and all(_is_in(text, content) for text in texts):
                yield f"{path.relative_to(run)} holds the text of row {number} of {rows}"


def _hashes_in(state: OpenState, read: Sequence[Hashes], rows: str | Path) -> Iterator[str]:
    """Yield the entries that kept a row, or were trained on it: as tokens or as a hash."""
    keys = [entry.key for entry in state.history.entries if entry.kept is not None]
    for key, own in state.kept(keys).items():
        parts = [own.seen, *(example_hashes(getattr(own, split)) for split in SPLITS)]
        held = [np.flatnonzero(np.isin(hashes, np.concatenate(parts))) for hashes in read]
        for number in np.unique(np.concatenate(held)):
            yield f"rows that {key} kept hold row {number + 1} of {rows}"


def _is_in(text: str, content: bytes) -> bool:
    """Say whether bytes hold a text, as it is or as in JSON."""
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return any(form.encode("utf-8", "surrogatepass") in content for form in forms)
