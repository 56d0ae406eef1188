"""Stream the rows of files and Hub datasets; every row knows its place (file and line).

Small files are read from disk once. Of larger ones, only `.json` files are loaded whole, so other
sources can be larger than memory.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import is_offline_mode

from chainlora.config.data import FIELDS_KEY
from chainlora.data.readers import READERS, CsvFile, Record, bad_row, parse_json, without_filling
from chainlora.errors import DataError

SUFFIXES = tuple(READERS)
_SMALL = 1 << 24  # bytes; files up to this size stay in memory
_HUB_ID = re.compile(r"^(?P<path>[\w.-]+/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")


class Row(dict[str, Any]):
    """One row: a dict with its `index` in the split and its `origin` (file and line)."""

    __slots__ = ("index", "origin")

    def __init__(self, values: Mapping[str, Any], index: int, origin: str) -> None:
        super().__init__(values)
        self.index = index
        self.origin = origin


def where(row: Mapping[str, Any], position: int = 0) -> str:
    """Return the file and line of a row, or its position if it is a plain dict."""
    return row.origin if isinstance(row, Row) else f"row {position}"


@dataclass
class Source(ABC):
    """Rows that can be read repeatedly: all rows, or the first `limit`, without the first `skip`.

    `fields` maps the name that a row needs to the column that holds it (`data.fields`).
    """

    limit: int | None = field(default=None, kw_only=True)
    skip: int = field(default=0, kw_only=True)
    fields: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def __str__(self) -> str:
        """Return the name of the source."""

    @property
    def place(self) -> str:
        """Return the text before the number of a row in messages."""
        return f"{self} row "

    @abstractmethod
    def records(self, first: int = 0) -> Iterator[Record]:
        """Yield the records from index `first` on. Raises DataError that names file and line."""

    @abstractmethod
    def identity(self) -> str:
        """Return a digest of the content: equal if and only if the rows are equal."""

    def state(self) -> object:
        """Return a cheap value that changes with the content, or None if the content is fixed."""
        return None

    def remark(self) -> str:
        """Return how reading differs from the usual, or "". May read all rows."""
        return ""

    def num_rows(self) -> int:
        """Return the number of rows. May read all rows."""
        return sum(1 for _ in self._records())

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows. Raises DataError for a bad row, which is named, and for no rows."""
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
        if self.fields:  # a column that already has such a name is dropped
            taken = {*self.fields, *self.fields.values()}
            named = {field: values[name] for field, name in self.fields.items() if name in values}
            values = {name: value for name, value in values.items() if name not in taken} | named
        return Row(values, index, origin)

    def check_fields(self) -> None:
        """Raise DataError if no row has a column of `fields`. Stops when all have been seen."""
        rows, missing = iter(self), set(self.fields)
        while missing:
            if (row := next(rows, None)) is None:
                columns = " and ".join(repr(self.fields[field]) for field in sorted(missing))
                rule, first = "`data.fields` must name columns of the rows", next(iter(self))
                has = f"the first row has {', '.join(map(str, first))}"
                remedy = f"correct it, e.g. {FIELDS_KEY} ({has})"
                raise DataError(rule, f"{columns}, which no row of {self} has", remedy)
            missing -= row.keys()


@lru_cache(maxsize=4)
def _content(path: Path, version: tuple[int, ...]) -> bytes:
    """Return the bytes of a file; `version` changes with them."""
    return path.read_bytes()


@dataclass
class FileSource(Source):
    path: Path
    # State and records of a `.json` file, which is parsed whole and therefore once.
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
        with self._readable(), self._opened() as file:
            yield from read(file, self.path)

    def _opened(self) -> BinaryIO:
        stat = self.path.stat()
        if stat.st_size > _SMALL:
            return self.path.open("rb")
        # st_ctime_ns: programs can set the time of modification back, but not this one
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return BytesIO(_content(self.path, version))

    def remark(self) -> str:
        if self._suffix() != ".csv":
            return ""
        with self._readable(), self._opened() as file:
            table = CsvFile(file, self.path)
            deque(islice(table.rows(), self.limit), maxlen=0)
            return table.remark()

    def identity(self) -> str:
        """Return the hash of the file's bytes; its name and times do not count."""
        with self._readable(), self._opened() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return f"{self._suffix()} {digest} {self.limit} {self.skip}"

    def state(self) -> object:
        with self._readable():
            stat = self.path.stat()
            return stat.st_size, stat.st_mtime_ns

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn an OSError of the block into a DataError."""
        try:
            yield
        except OSError as error:
            got = f"{self.path}: {error.strerror}"
            raise DataError("data file must be readable", got, "check it") from error

    def _suffix(self) -> str:
        suffix = self.path.suffix.lower()
        if suffix not in READERS:
            raise DataError(
                f"a data file must end in {', '.join(SUFFIXES)}", self.path, "convert or rename it"
            )
        return suffix


@dataclass
class HubSource(Source):
    """One split of a Hub dataset. Code of the dataset is never run."""

    path: str
    split: str
    name: str | None = None  # the configuration, if the dataset declares some
    folder: str | None = None  # in the repository; converted Parquet has one per configuration
    revision: str | None = None  # branch, tag or commit

    def __str__(self) -> str:
        return f"{self.path} {self.split}"

    @cached_property
    def table(self) -> Any:
        """Return the dataset, which its library maps into memory."""
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
                "go online, or name a local file or folder of rows"
            ) from error

    def records(self, first: int = 0) -> Iterator[Record]:
        rows = self.table.skip(first) if first else self.table
        return map(Record, count(first), map(without_filling, rows))

    def num_rows(self) -> int:
        count = len(self.table) if self.limit is None else min(self.limit, len(self.table))
        return count - self.skip

    def identity(self) -> str:
        return f"hub {self.table._fingerprint} {self.limit} {self.skip}"


@dataclass
class ListSource(Source):
    """Rows in memory; each keeps its index."""

    parsed: Sequence[Row]

    def __str__(self) -> str:
        return "a list"

    def records(self, first: int = 0) -> Iterator[Record]:
        return map(Record, count(first), self.parsed[first:])

    def identity(self) -> str:
        rows = "".join(f"{row.index} {dict(row)!r}" for row in self.parsed)
        content = f"{self.skip}{rows}".encode("utf-8", "surrogatepass")
        return f"rows {hashlib.sha256(content).hexdigest()}"


def find_source(source: str | Path, split: str = "train", limit: int | None = None) -> Source:
    """Return the rows of a file, of a split in a folder, or of a Hub dataset.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a folder holding
            ``<split>.<suffix>``; or a Hub dataset as ``owner/name``, ``owner/name:config`` or
            ``owner/name@revision``.
        split: which split of a folder or Hub dataset; a file is one split already.
        limit: read only this many rows, the first ones.

    Raises:
        DataError: no such file, folder or dataset.
    """
    path = Path(source)
    if path.is_dir():
        if (file := find_file(path, [split])) is None:
            names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            rule = f"a data folder must hold the split {split!r} as one of {names}"
            raise DataError(rule, f"{path} without", "name the file itself or rename it")
        path = file
    if path.is_file():
        return FileSource(path, limit=limit)
    match = _HUB_ID.match(str(source))
    if match is None or path.suffix.lower() in SUFFIXES:
        begin = "" if path.is_absolute() else f", relative to {Path.cwd()}"
        rule = "data must be a file, a folder or a Hub dataset owner/name"
        raise DataError(rule, source, f"check the path{begin}")
    return HubSource(match["path"], split, match["name"], None, match["revision"], limit=limit)


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the file of the first stem with one in `folder`, or None. Refuses several."""
    for stem in stems:
        files = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
        if len(files) > 1:
            got = f"{', '.join(path.name for path in files)} in {folder}"
            remedy = "name the file itself, or move the others away"
            raise DataError("a data folder must hold a split in one file", got, remedy)
        if files:
            return files[0]
    return None
