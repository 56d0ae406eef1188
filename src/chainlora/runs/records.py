"""Read and write ``metrics.jsonl``, one JSON object per line, and read ``result.json``.

Lines are only appended. ``stage.json`` has the number of lines up to its point, and the hash of
their bytes; a resume keeps exactly these lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from chainlora.errors import RunError
from chainlora.files import reported, sync_file, write_bytes
from chainlora.runs.documents import DAMAGED
from chainlora.runs.draft import Records
from chainlora.runs.locks import need_own

Record = Mapping[str, Any]

_NOT_SCORES = {
    *("event", "step", "link", "where", "split", "rows", "tokens", "seconds"),
    *("loss", "perplexity", "majority", "candidate_loss"),
}
_TEXTS = ("event", "where")  # keys with text; all others are numbers
_MOST_SCORES = 3  # curves in one picture; more are hard to distinguish


class RecordLog:
    """The records of a run that writes them; `lines` exist already."""

    def __init__(self, path: Path, lines: Sequence[bytes] = ()) -> None:
        self.path = path
        self._kept = b"".join(lines)
        self._hash = hashlib.sha256(self._kept)
        self.count = len(lines)

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a line, without a flush to disk."""
        line = json.dumps(values).encode() + b"\n"
        need_own(self.path)
        with reported(self.path), self.path.open("ab") as file:
            file.write(line)
        self._hash.update(line)
        self.count += 1

    def flushed(self) -> Records:
        """Flush the records to disk; return their number and hash."""
        if self.count:
            with reported(self.path):
                sync_file(self.path)
        return Records(count=self.count, sha256=self._hash.hexdigest())

    def cut(self) -> None:
        """Remove all lines from the file that the log was not made with."""
        if self.path.is_file() and self.path.stat().st_size != len(self._kept):
            write_bytes(self.path, self._kept)


def check_records(path: Path, known: Records) -> list[bytes]:
    """Return the `known` lines. Raises RunError if they have changed."""
    with reported(path, "read"):
        lines = _lines(path.read_bytes() if path.is_file() else b"")[: known.count]
    if hashlib.sha256(b"".join(lines)).hexdigest() != known.sha256:
        got = f"other bytes in {path}"
        raise RunError("metrics.jsonl must be as the run wrote it", got, DAMAGED)
    return lines


def read_records(path: Path) -> list[Record]:
    """Read ``metrics.jsonl``; return no records if it is missing.

    An incomplete last line, left by a kill, is skipped. Raises RunError for any other invalid line.
    """
    with reported(path, "read"):
        lines = _lines(path.read_bytes()) if path.is_file() else []
    try:
        records = [json.loads(line) for line in lines]
        if not all(isinstance(record, dict) and "event" in record for record in records):
            raise ValueError("a line without an event")
    except (ValueError, RecursionError) as error:
        rule = "metrics.jsonl must hold one JSON object a line"
        raise RunError(rule, f"{path}: {error}", "remove the broken line") from None
    for key, value in (item for record in records for item in record.items()):
        if not isinstance(value, str if key in _TEXTS else int | float):
            rule, got = "metrics.jsonl must hold numbers", f"{value!r:.40} for `{key}` in {path}"
            raise RunError(rule, got, "remove the broken line")
    return records


def of_event(records: Iterable[Record], event: str) -> list[Record]:
    """Return the records of one event."""
    return [record for record in records if record["event"] == event]


def last_loss(steps: Sequence[Record]) -> float | None:
    """Return the mean training loss over the last tenth of the steps, None without steps."""
    tail = steps[-max(1, len(steps) // 10) :]
    return sum(step["loss"] for step in tail) / len(tail) if tail else None


def score_names(evaluations: Sequence[Record]) -> list[str]:
    """Return the metrics to draw as curves; the main metric of the task is first."""
    names = {
        name: None
        for record in evaluations
        for name, value in record.items()
        if name not in _NOT_SCORES and isinstance(value, int | float)
    }
    return list(names)[:_MOST_SCORES]


def _lines(content: bytes) -> list[bytes]:
    """Return the complete lines of a file, with their line ends."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


# --- result.json ---


@with_config(ConfigDict(extra="allow"))
class _Result(TypedDict):
    """The keys that reports show."""

    metrics: dict[str, dict[str, float]]
    trainable_parameters: int
    peak_memory_mb: int | None
    hardware: dict[str, Any]
    versions: dict[str, str]


def read_result(path: Path) -> dict[str, Any]:
    """Read a ``result.json``. Raises RunError for missing keys or values of a wrong type."""
    with reported(path, "read"):
        content = path.read_bytes()
    try:
        return dict(TypeAdapter(_Result).validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        got = f"{first['msg']} at {where} in {path}"
        raise RunError("result.json must hold a run's result", got, DAMAGED) from None
