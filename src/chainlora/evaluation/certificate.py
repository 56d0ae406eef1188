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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from chainlora import files
from chainlora.data.kept import SPLITS, Kept
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


def begin_certificate(
    place: Path, run: Path, before: History, counts: Mapping[str, Counts], *, again: bool = False
) -> None:
    """Write what a run holds before an update, unless the same update was stopped (`again`).

    Raises RunError if a certificate is there already.
    """
    if place.exists():
        raise RunError(f"Cannot write {place}: it exists. Name another by --certificate.")
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
        removed = sum(counts.removed or 0 for counts in document.stages.values())
        given = find_source(rows).num_rows()
        if all(c.removed is not None for c in document.stages.values()) and given != removed:
            differences.append(f"{rows}: {given} rows, and {removed} were removed")
        differences += _rows_in(state, Path(rows))
    return differences


def _other_products(state: OpenState, before: Held, after: Held) -> Iterator[str]:
    """Yield how the files of a run differ from a certificate."""
    history, run = state.history, state.run
    states = {history.empty.digest, *(entry.state.digest for entry in history.entries)}
    if after.state not in states:
        yield f"{run} has no state {after.state}"
    if history.versions[history.at].marks:
        yield f"{run} has not deleted what was marked: chainlora train {run} ends it"
    for name, digest in after.files.items():
        if not (run / name).is_file():
            yield f"{name} is gone"
        elif not files.sha256(run / name).startswith(digest):
            yield f"{name} has other bytes"
    former = {name: digest for name, digest in before.files.items() if name not in after.files}
    gone = {*former.values()} - {*after.files.values()}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name in former or any(files.sha256(path).startswith(digest) for digest in gone):
            yield f"{name} was deleted, and is there again"


def _rows_in(state: OpenState, rows: Path) -> Iterator[str]:
    """Yield the places of a run that hold a row of a file: as text, as tokens or as a hash."""
    values = [[str(v) for v in dict(row).values() if len(str(v)) > 3] for row in find_source(rows)]
    for path in sorted(path for path in state.run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for number, texts in enumerate(values, 1):
            if texts and all(_is_in(text, content) for text in texts):
                yield f"{path.relative_to(state.run)} holds the text of row {number} of {rows}"
    base, tokenizer = OpenBase.of_state(state), state.tokenizer()
    kept = state.kept([e.key for e in state.history.entries if e.kept is not None])
    read, error, found = 0, None, dict[tuple[str, int], None]()
    for stage in state.history.plan().stages:
        config = config_of(state.run, stage)
        update: dict[str, Any] = {"train": str(rows), "validation": None}
        update |= {"test": None, "replay": None, "new_rows_only": False}
        data = config.data.model_copy(update=update)
        try:
            own, loss = base.tokenizer(tokenizer), config.train.loss
            with without_warnings():
                splits = prepare_splits(data, own, base.context, loss=loss, compare=False)
        except ChainLoRAError as refused:  # such as rows of another stage, with other columns
            error = refused
            continue
        read += 1
        found |= dict.fromkeys(_found_in(kept, example_hashes(splits.own)))
    for key, number in found:
        yield f"rows that {key} kept hold row {number + 1} of {rows}"
    if not read and error is not None:
        raise error


def _found_in(kept: Mapping[str, Kept], hashes: np.ndarray) -> Iterator[tuple[str, int]]:
    """Yield entries and the numbers of the rows, by hashes, that they kept or were trained on."""
    for key, own in kept.items():
        parts = [own.seen, *(example_hashes(getattr(own, split)) for split in SPLITS)]
        for number in np.flatnonzero(np.isin(hashes, np.concatenate(parts))):
            yield key, int(number)


def _is_in(text: str, content: bytes) -> bool:
    """Say whether bytes hold a text, as it is or as in JSON."""
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return any(form.encode("utf-8", "surrogatepass") in content for form in forms)
