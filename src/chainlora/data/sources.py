"""Rows of files and Hub datasets as a stream, each with the place it came from.

Nothing is loaded whole (but `.json`, which is one value), so a source may be larger than memory.
"""

from __future__ import annotations

import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from chainlora.data.readers import (
    READERS,
    CsvFile,
    Record,
    bad_row,
    parse_json,
    without_filling,
)
from chainlora.errors import DataError
from chainlora.files import sha256

_log = logging.getLogger(__name__)

SUFFIXES = tuple(READERS)
_HUB_ID = re.compile(r"^(?P<path>[\w.-]+/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")


class Row(dict[str, Any]):
    """One row: a dict that knows its `index` in the split and its `origin`, file and line."""

    __slots__ = ("index", "origin")

    def __init__(self, values: Mapping[str, Any], index: int, origin: str) -> None:
        super().__init__(values)
        self.index = index
        self.origin = origin


def where(row: Mapping[str, Any], position: int = 0) -> str:
    """Return the file and line of a row, or its position when it came from no file."""
    return row.origin if isinstance(row, Row) else f"row {position}"


@dataclass
class Source(ABC):
    """Rows that can be read again and again: all of them, or the first `limit`.

    `skip` of these are left out. `fields` are names that columns get, with those that they have.
    """

    limit: int | None = field(default=None, kw_only=True)
    skip: int = field(default=0, kw_only=True)
    fields: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def __str__(self) -> str:
        """Return the name of the whole."""

    @property
    def place(self) -> str:
        """What stands before the number of a row."""
        return f"{self} row "

    @abstractmethod
    def records(self, first: int = 0) -> Iterator[Record]:
        """Yield the records from number `first` on. Raises DataError that names file and line."""

    @abstractmethod
    def identity(self) -> str:
        """Return a name of the content: equal for equal rows, different for others."""

    def state(self) -> object:
        """Return a value that changes with the content and costs nothing, None if there is none."""
        return None

    def remark(self) -> str:
        """Return what is unusual in how the rows are read, "" for nothing. May read all of them."""
        return ""

    def tell_remark(self) -> None:
        if remark := self.remark():
            _log.warning("%s", remark)

    def num_rows(self) -> int:
        """Return the number of rows. May read all of them."""
        return sum(1 for _ in self._records())

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows. Raises DataError that names a bad one, or if there are none at all."""
        index = -1
        for index, record in enumerate(self._records()):
            yield self._row(record, index)
        if index < 0:
            raise DataError("data must hold at least one row", f"none in {self}", "check the file")

    def _records(self) -> Iterator[Record]:
        most = None if self.limit is None else max(0, self.limit - self.skip)
        return islice(self.records(self.skip), most)

    def _row(self, record: Record, index: int) -> Row:
        values, origin = record.payload, f"{self.place}{record.number}"
        if isinstance(values, Row):
            return values
        if isinstance(values, bytes):
            values = parse_json(values, origin)
        if not isinstance(values, Mapping) or not values:
            got = "an empty object" if values == {} else f"{type(values).__name__} {values!r:.40}"
            raise bad_row("a row must be an object of named values", got, origin)
        if self.fields:  # a column that had such a name is another
            taken = {*self.fields, *self.fields.values()}
            named = {field: values[name] for field, name in self.fields.items() if name in values}
            values = {name: value for name, value in values.items() if name not in taken} | named
        return Row(values, index, origin)

    def check_fields(self) -> None:
        """Raise DataError for a column of `fields` that no row has; read as few as it takes."""
        rows, missing = iter(self), set(self.fields)
        while missing:
            if (row := next(rows, None)) is None:
                got = " and ".join(repr(self.fields[each]) for each in sorted(missing))
                rule, first = "`data.fields` must name columns of the rows", next(iter(self))
                remedy = f"correct it (the first row has {', '.join(map(str, first))})"
                raise DataError(rule, f"{got}, which no row of {self} has", remedy)
            missing -= row.keys()


@dataclass
class FileSource(Source):
    path: Path
    # State and records of a `.json` file: it is parsed whole, so once for all workers.
    _parsed: tuple[object, list[Record]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __str__(self) -> str:
        return str(self.path)

    @property
    def place(self) -> str:
        return f"{self.path} {READERS[self._suffix()][1]} "

    def records(self, first: int = 0) -> Iterator[Record]:
        if self._suffix() != ".json":
            return islice(self._read(), first, None)
        if self._parsed is None or self._parsed[0] != self.state():
            self._parsed = self.state(), list(self._read())
        return iter(self._parsed[1][first:])

    def _read(self) -> Iterator[Record]:
        read, _ = READERS[self._suffix()]
        try:
            with self.path.open("rb") as file:
                yield from read(file, self.path)
        except OSError as error:
            raise self._unreadable(error) from error

    def remark(self) -> str:
        if self._suffix() != ".csv":
            return ""
        try:
            with self.path.open("rb") as file:
                table = CsvFile(file, self.path)
                deque(islice(table.rows(), self.limit), maxlen=0)
                return table.remark()
        except OSError as error:
            raise self._unreadable(error) from error

    def identity(self) -> str:
        """Return the hash of the file's bytes, whatever its name and times."""
        try:
            return f"{self._suffix()} {sha256(self.path)} {self.limit} {self.skip}"
        except OSError as error:
            raise self._unreadable(error) from error

    def state(self) -> object:
        try:
            found = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return found.st_size, found.st_mtime_ns

    def _unreadable(self, error: OSError) -> DataError:
        got = f"{self.path}: {error.strerror}"
        return DataError("data file must be readable", got, "check it")

    def _suffix(self) -> str:
        suffix = self.path.suffix.lower()
        if suffix not in READERS:
            raise DataError(
                f"a data file must end in {', '.join(SUFFIXES)}", self.path, "convert or rename it"
            )
        return suffix


@dataclass
class HubSource(Source):
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

    def __str__(self) -> str:
        return f"{self.path} {self.split}"

    @cached_property
    def table(self) -> Any:
        """The dataset, memory-mapped by its library."""
        from datasets import load_dataset

        try:
            return load_dataset(
                self.path, self.name, data_dir=self.folder, revision=self.revision, split=self.split
            )
        except Exception as error:  # a dozen unrelated types for "could not get it"
            reason = " ".join(str(error).split())[:200]
            if is_offline_mode():
                reason = "HF_HUB_OFFLINE is set and the dataset is not in the cache"
            raise DataError(
                f"Hub dataset {self.path} split {self.split!r} must be reachable (got: {reason}); "
                "go online, or name a local folder of rows (data.dir, --data DIR)"
            ) from error

    def records(self, first: int = 0) -> Iterator[Record]:
        rows = self.table.skip(first) if first else self.table
        return map(Record, count(first), map(without_filling, rows))

    def num_rows(self) -> int:
        found = len(self.table) if self.limit is None else min(self.limit, len(self.table))
        return found - self.skip

    def identity(self) -> str:
        return f"hub {self.table._fingerprint} {self.limit} {self.skip}"


@dataclass
class ListSource(Source):
    """Rows that are in memory, each with an index of its own."""

    parsed: Sequence[Row]

    def __str__(self) -> str:
        return "a list"

    def records(self, first: int = 0) -> Iterator[Record]:
        return map(Record, count(first), self.parsed[first:])

    def identity(self) -> str:
        digest = hashlib.sha256(f"{self.skip}".encode())
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
        if (found := find_file(path, [split])) is None:
            names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            rule = f"a data folder must hold the split {split!r} as one of {names}"
            raise DataError(rule, f"{path} without", "name the file itself or rename it")
        path = found
    if path.is_file():
        return FileSource(path, limit=limit)
    match = _HUB_ID.match(str(source))
    if match is None or path.suffix.lower() in SUFFIXES:
        begin = "" if path.is_absolute() else f", which begins in {Path.cwd()}"
        raise DataError(
            f"data must be a file, a folder or a Hub dataset owner/name (got {source}, which is "
            f"none of them); check the path{begin}"
        )
    return HubSource(
        match["path"], split, name=match["name"], revision=match["revision"], limit=limit
    )


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the file of the first stem that `folder` has as ``<stem><suffix>``, or None.

    Raises DataError where one stem has several files.
    """
    for stem in stems:
        found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(
                f"a data folder must hold a split in one file (got {names} in {folder}); name the "
                "file itself, or move the others away"
            )
        if found:
            return found[0]
    return None
