"""Rows of files and Hub datasets as a stream, each with the place it came from.

Nothing is loaded whole (but `.json`, which is one value), so a source may be larger than memory. A
source gives its rows in chunks whose parsing is left to whoever takes them, which may be another
process.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from chainlora.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"^(?P<path>[\w.-]+/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")
_CHUNK = 256  # rows read at a time where nobody says otherwise
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character, when it stands alone


class Row(dict[str, Any]):
    """One row: a dict that knows its `index` (in its split, file order) and `origin` (file and
    line)."""

    __slots__ = ("index", "origin")

    def __init__(self, values: Mapping[str, Any], index: int, origin: str) -> None:
        super().__init__(values)
        self.index = index
        self.origin = origin


def where(row: Mapping[str, Any], position: int = 0) -> str:
    """Return the file and line of a row, or its position when it came from no file."""
    return row.origin if isinstance(row, Row) else f"row {position}"


class Record(NamedTuple):
    """One row as it is read, before it is parsed."""

    number: int  # of the line or row, as the source counts
    payload: Any  # the bytes of a JSON line, else the values
    share: float  # of the source that has been read, in 0…1


class Chunk(Protocol):
    """Some consecutive rows of a source, which another process may parse."""

    @property
    def share(self) -> float:
        """Return how much of the source has been read after this chunk, in 0…1."""
        ...

    def rows(self) -> Sequence[Row]:
        """Parse the rows. Raises DataError that names the bad one."""
        ...


class Source(Protocol):
    """Rows that can be read again and again."""

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield the rows, `size` at a time. Raises DataError where there are none."""
        ...

    def identity(self) -> str:
        """Return what names the content: equal for equal rows, another for others."""
        ...


@dataclass(frozen=True)
class RecordChunk:
    """Records of a file or Hub dataset."""

    records: Sequence[Record]
    first: int  # index of the first row
    place: str

    @property
    def share(self) -> float:
        """Return how much of the source has been read after this chunk, in 0…1."""
        return self.records[-1].share

    def rows(self) -> Sequence[Row]:
        """Parse the rows. Raises DataError that names the bad one."""
        return [
            _row(record, index, f"{self.place} {record.number}")
            for index, record in enumerate(self.records, start=self.first)
        ]


@dataclass(frozen=True)
class RowChunk:
    """Rows that are parsed already."""

    parsed: Sequence[Row]
    share: float

    def rows(self) -> Sequence[Row]:
        """Return the rows."""
        return self.parsed


@dataclass(frozen=True)
class FileSource:
    """The rows of a file, all of them or the first `limit`."""

    path: Path
    limit: int | None = None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield the rows, `size` at a time. Raises DataError that names file and line."""
        read, unit = _READERS[self._suffix()]
        try:
            yield from _chunks(read(self.path), f"{self.path} {unit}", size, self.limit)
        except OSError as error:
            raise DataError(
                f"data file must be readable (got {self.path}: {error.strerror}); check it"
            ) from error

    def identity(self) -> str:
        """Return the hash of the file's bytes (1.4 GB a second), whatever its name and times."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{self._suffix()} {digest} {self.limit}"

    def _suffix(self) -> str:
        suffix = self.path.suffix.lower()
        if suffix not in _READERS:
            raise DataError(
                f"a data file must end in {', '.join(SUFFIXES)} (got {self.path}); convert or "
                "rename it"
            )
        return suffix


@dataclass(frozen=True)
class HubSource:
    """One split of a Hub dataset; no code of the dataset is ever run.

    `name` is the configuration, where the dataset declares some; `folder` the folder inside the
    repository (branches of converted Parquet have one a configuration); `revision` a branch, tag or
    commit.
    """

    path: str
    split: str
    name: str | None = None
    folder: str | None = None
    revision: str | None = None
    limit: int | None = None

    @cached_property
    def table(self) -> Any:
        """The dataset, memory-mapped by its library."""
        from datasets import load_dataset

        try:
            return load_dataset(
                self.path,
                self.name,
                data_dir=self.folder,
                revision=self.revision,
                split=self.split,
            )
        except Exception as error:  # a dozen unrelated types for "could not get it"
            reason = " ".join(str(error).split())[:200]
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                reason = "HF_HUB_OFFLINE is set and the dataset is not in the cache"
            raise DataError(
                f"Hub dataset {self.path} split {self.split!r} must be reachable (got: {reason}); "
                "go online, or name a local folder of rows (data.dir, --data DIR)"
            ) from error

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield the rows, `size` at a time. Raises DataError where the Hub does not give them."""
        count = len(self.table)
        records = (Record(i, row, (i + 1) / count) for i, row in enumerate(self.table))
        yield from _chunks(records, f"{self.path} {self.split} row", size, self.limit)

    def identity(self) -> str:
        """Return the dataset library's own fingerprint of the table."""
        return f"hub {self.table._fingerprint} {self.limit}"


@dataclass(frozen=True)
class ListSource:
    """Rows that are in memory."""

    parsed: Sequence[Row]

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield the rows, `size` at a time."""
        for start in range(0, len(self.parsed), size):
            part = self.parsed[start : start + size]
            yield RowChunk(part, min(1.0, (start + size) / len(self.parsed)))

    def identity(self) -> str:
        """Return the hash of the rows and their indices."""
        digest = hashlib.sha256()
        for row in self.parsed:
            digest.update(f"{row.index} {dict(row)!r}".encode("utf-8", "surrogatepass"))
        return f"rows {digest.hexdigest()}"


def find_source(source: str | Path, split: str = "train", limit: int | None = None) -> Source:
    """Return the rows of a file, of a split in a folder, or of a Hub dataset.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a folder holding
            ``<split>.<suffix>``; or a Hub dataset as ``owner/name``, ``owner/name:config`` or
            ``owner/name@revision``.
        split: which split of a folder or Hub dataset; a file is one split already.
        limit: the first rows only; no more than these are read.

    Raises:
        DataError: no such file, folder or dataset.
    """
    path = Path(source)
    if path.is_dir():
        path = find_file(path, [split]) or _missing(path, split)
    if path.is_file():
        return FileSource(path, limit)
    match = _HUB_ID.match(str(source))
    if match is None or path.suffix.lower() in SUFFIXES:
        raise DataError(
            f"data must be a file, a folder or a Hub dataset owner/name (got {source}, which is "
            "none of them); check the path"
        )
    return HubSource(
        match["path"], split, name=match["name"], revision=match["revision"], limit=limit
    )


def load_rows(source: str | Path, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read the rows of a file, of a split in a folder, or of a Hub dataset, as `find_source`.

    Raises DataError on a missing, unreadable or empty source, and on a row that is not an object of
    named values (file and line are named).
    """
    return list(iterate(find_source(source, split, limit)))


def iterate(source: Source, size: int = _CHUNK) -> Iterator[Row]:
    """Yield the rows of a source one by one."""
    for chunk in source.chunks(size):
        yield from chunk.rows()


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the first ``<stem><suffix>`` in `folder`, or None."""
    candidates = (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _missing(folder: Path, split: str) -> Path:
    names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    raise DataError(
        f"a data folder must hold the split {split!r} as one of {names} (got {folder} without); "
        "name the file itself or rename it"
    )


def _chunks(
    records: Iterable[Record], place: str, size: int, limit: int | None
) -> Iterator[RecordChunk]:
    stream, first = islice(records, limit), 0
    while part := list(islice(stream, size)):
        yield RecordChunk(part, first, place)
        first += len(part)
    if not first:
        source = place.rpartition(" ")[0]
        raise DataError(f"data must hold at least one row (got none in {source}); check the file")


def _row(record: Record, index: int, origin: str) -> Row:
    values = record.payload
    if isinstance(values, bytes):
        values = _parse(values, origin)
    if not isinstance(values, Mapping) or not values:
        raise DataError(
            f"a row must be an object of named values (got {_kind(values)} at {origin}); "
            "correct or remove it"
        )
    return Row(values, index, origin)


def _kind(values: Any) -> str:
    return (
        "an empty object"
        if isinstance(values, Mapping)
        else f"{type(values).__name__} {values!r:.40}"
    )


# --- one reader a format ---


def _read_jsonl(path: Path) -> Iterator[Record]:
    size, done = max(path.stat().st_size, 1), 0
    with path.open("rb") as lines:  # bytes: str.splitlines would also split at U+2028 inside a text
        for number, line in enumerate(lines, start=1):
            done += len(line)
            if line.strip():
                yield Record(number, line, done / size)


def _read_json(path: Path) -> Iterator[Record]:
    tree = _parse(path.read_bytes(), str(path))
    if isinstance(tree, Mapping) and isinstance(tree.get("data"), list):
        tree = tree["data"]  # what pandas writes with orient="table"
    if not isinstance(tree, list):
        raise DataError(
            "a .json data file must hold a list of rows, or an object with the list under `data` "
            f"(got {type(tree).__name__} in {path}); one row a line is .jsonl"
        )
    for number, item in enumerate(tree):
        yield Record(number, item, (number + 1) / len(tree))


def _read_csv(path: Path) -> Iterator[Record]:
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw, TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise DataError(
                        f"a CSV row must have the header's {len(reader.fieldnames or [])} fields "
                        f"(got another number at {path} line {reader.line_num}); correct or remove "
                        "it"
                    )
                yield Record(reader.line_num, values, raw.tell() / size)
        except UnicodeDecodeError:
            raise DataError(
                f"data must be UTF-8 (got other bytes in {path} after line {reader.line_num}); "
                "convert the file"
            ) from None
        except csv.Error as error:
            raise DataError(
                f"data must be CSV (got {error} at {path} line {reader.line_num}); correct it, or "
                "write JSON lines"
            ) from None


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        count, number = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_CHUNK):
            for values in batch.to_pylist():
                yield Record(number, values, (number + 1) / count)
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data file must be Parquet (got {path}: {reason:.120}); write it again"
        ) from None


_READERS = {
    ".jsonl": (_read_jsonl, "line"),
    ".json": (_read_json, "row"),
    ".csv": (_read_csv, "line"),
    ".parquet": (_read_parquet, "row"),
}


# --- JSON ---


def _parse(content: bytes, origin: str) -> Any:
    try:
        values = json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
        if _SURROGATE.search(content):
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        return values
    except UnicodeDecodeError:
        raise DataError(
            f"data must be UTF-8 (got other bytes at {origin}); convert the file"
        ) from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"a text must be whole characters (got half of one, {half!a}, at {origin}); correct "
            "or remove it"
        ) from None
    except json.JSONDecodeError as error:
        place = origin if " line " in origin else f"{origin} line {error.lineno}"
        raise DataError(
            f"data must be JSON (got {error.msg} at {place} column {error.colno}); "
            "correct or remove it"
        ) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; deep nesting
        reason = str(error).partition(";")[0]
        raise DataError(
            f"data must be JSON that can be read (got: {reason} at {origin}); correct or remove it"
        ) from None
