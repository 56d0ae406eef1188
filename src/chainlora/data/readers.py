"""Records of a file, one reader a format; only `.json`, which is one value, is loaded whole."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chainlora.errors import DataError

_CORRECT = "correct or remove the row"
_BOM_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ENCODINGS = {"utf-8-sig": "UTF-8", "utf-16": "UTF-16", "cp1252": "Windows-1252"}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_BLOCK = 1 << 16  # bytes of a CSV file decoded at a time to find its encoding
_BATCH = 256  # rows of a Parquet file decoded at a time
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character, when it stands alone


def bad_row(rule: str, got: object, place: str, remedy: str = _CORRECT) -> DataError:
    """Return what is wrong with a row, which is named by file and line."""
    return DataError(rule, f"{got} at {place}", remedy)


def not_utf8(error: UnicodeDecodeError, place: str) -> DataError:
    """Return what a text that is not UTF-8 probably is, and how to convert it."""
    name, got = "WINDOWS-1252", "probably Latin-1 or Windows-1252"
    if error.object.startswith(_BOM_UTF16):
        name = got = "UTF-16"
    else:
        got += f", {_near(error)},"
    return bad_row("data must be UTF-8", got, place, f"convert it: iconv -f {name} -t UTF-8")


def _near(error: UnicodeDecodeError) -> str:
    """Return the text around a byte that is not UTF-8, as Windows-1252, of its line."""
    before = error.object[max(0, error.start - 10) : error.start].rpartition(b"\n")[2]
    after = error.object[error.start : error.start + 10].splitlines()[0]
    return repr((before + after).decode("cp1252", "replace"))


class Record(NamedTuple):
    """One row as it is read, before it is parsed."""

    number: int | str  # of the line or row, as the source counts
    payload: Any  # the bytes of a JSON line, else the values


def _read_jsonl(file: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):  # bytes: splitlines would split at U+2028 too
        if line.strip():
            yield Record(number, line)


def _read_json(file: BinaryIO, path: Path) -> Iterator[Record]:
    tree = parse_json(file.read(), str(path), second="one row a line is .jsonl")
    if isinstance(tree, Mapping) and isinstance(tree.get("data"), list):
        tree = tree["data"]  # what pandas writes with orient="table"
    if not isinstance(tree, list):
        raise DataError(
            "a .json data file must hold a list of rows, or an object with the list under `data` "
            f"(got {type(tree).__name__} in {path}); one row a line is .jsonl"
        )
    yield from map(Record, count(), tree)


class CsvFile:
    """A CSV file, in the encoding and with the separator that the header and the bytes show.

    `num_empty` counts the rows without any value that were left out so far.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path, self.num_empty = path, 0
        self.padded: list[str] = []  # names of columns that had blanks around them
        self.encoding, self.near = _encoding(file)
        file.seek(0)
        self.text = TextIOWrapper(file, self.encoding, newline="")
        self.separator = ","

    def rows(self) -> Iterator[Record]:
        line = 0  # the last line read, of a row of several
        try:
            self.separator = _separator(self.text.readline())
            self.text.seek(0)
            reader = csv.reader(self.text, strict=True, delimiter=self.separator)
            names = self._names(next(reader, []))
            line = reader.line_num
            for values in reader:
                first, line = line + 1, reader.line_num
                if not any(map(str.strip, values)):
                    self.num_empty += bool(values)  # an empty line is no row
                    continue
                if len(values) != len(names):
                    rule = f"a CSV row must have the header's {len(names)} fields"
                    raise bad_row(rule, len(values), f"{self.path} line {first}")
                yield Record(first, dict(zip(names, values, strict=True)))
        except UnicodeDecodeError as error:
            rule = "a CSV file must be UTF-8, UTF-16 or Windows-1252"
            got = f"another one, with the byte {error.object[error.start]:#04x},"
            place, remedy = f"{self.path} after line {line}", "convert it: iconv -f NAME -t UTF-8"
            raise bad_row(rule, got, place, remedy) from None
        except csv.Error as error:
            place, remedy = f"{self.path} line {line + 1}", "correct it, or write JSON lines"
            raise bad_row("data must be CSV", error, place, remedy) from None

    def _names(self, header: Sequence[str]) -> list[str]:
        self.padded = [name for name in header if name != name.strip()]
        names = [name.strip() for name in header]
        _check_names(names, self.path)
        return names

    def remark(self) -> str:
        """Return how the rows read so far differ from UTF-8 with commas; nothing if they do not."""
        parts = {
            f"as {_ENCODINGS[self.encoding]}{self.near}": self.encoding != "utf-8-sig",
            f"separated by {_SEPARATORS[self.separator]}": self.separator != ",",
            f"without the blanks around {', '.join(map(repr, self.padded))}": self.padded,
            f"without {self.num_empty} empty row{'s' * (self.num_empty > 1)}": self.num_empty,
        }
        said = ", ".join(part for part, is_unusual in parts.items() if is_unusual)
        return f"{self.path}: read {said}" if said else ""


def _encoding(file: BinaryIO) -> tuple[str, str]:
    """Return the encoding of a file that Excel may have saved, and a text that shows it.

    All bytes are read: the first one that is not ASCII may be in the last row.
    """
    head = file.read(3)
    if head == codecs.BOM_UTF8 or head[:2] in _BOM_UTF16:
        return ("utf-16" if head[:2] in _BOM_UTF16 else "utf-8-sig"), ""
    file.seek(0)
    try:
        blocks = iter(lambda: file.read(_BLOCK), b"")
        deque(codecs.iterdecode(blocks, "utf-8"), maxlen=0)
    except UnicodeDecodeError as error:
        return "cp1252", f" ({_near(error)})"
    return "utf-8-sig", ""


def _separator(header: str) -> str:
    """Return the comma, or what cuts the header into most fields where no comma cuts it."""
    fields = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in _SEPARATORS}
    return "," if fields[","] > 1 else max(fields, key=fields.__getitem__)


def _read_csv(file: BinaryIO, path: Path) -> Iterator[Record]:
    return CsvFile(file, path).rows()


def _read_parquet(file: BinaryIO, path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        _check_names(table.schema_arrow.names, path)
        number = count()
        for batch in table.iter_batches(batch_size=_BATCH):
            for values in batch.to_pylist():
                yield Record(next(number), without_filling(values))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data file must be Parquet (got {path}: {reason:.120}); write it again"
        ) from None


def without_filling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table without the nulls in the parts of a list's objects.

    A column has one type: the arguments of a call get a null for each argument of every other call,
    and so do the properties of a tool.
    """
    return {
        name: list(map(_object_without, value)) if isinstance(value, list) else value
        for name, value in values.items()
    }


def _object_without(value: Any) -> Any:
    is_object = isinstance(value, dict)
    return {key: _without_nulls(part) for key, part in value.items()} if is_object else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_without_nulls, value))
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return value


def _check_names(names: Sequence[str], path: Path) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError("columns must have different names", f"{twice[0]!r} twice in {path}")


READERS: Mapping[str, tuple[Callable[[BinaryIO, Path], Iterator[Record]], str]] = {
    ".jsonl": (_read_jsonl, "line"),
    ".json": (_read_json, "row"),
    ".csv": (_read_csv, "line"),
    ".parquet": (_read_parquet, "row"),
}
"""Suffix → reader, and what its numbers count."""


def is_rows(path: str | Path) -> bool:
    """Say whether a path is that of a file of rows by its suffix; a .json is by its first letter,
    as a config can be an object of JSON."""
    file = Path(path)
    if file.suffix.lower() != ".json" or not file.is_file():
        return file.suffix.lower() in READERS
    with file.open("rb") as opened:
        return opened.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


# --- JSON ---


def parse_json(content: bytes, origin: str, second: str = _CORRECT) -> Any:
    """Return the one value of a text. `second` is what to do where another follows."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # Python would take the last one
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise bad_row("a JSON object must have a key once", f"{twice!r:.60} twice", origin)
        return found

    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
        values = json.loads(text, object_pairs_hook=once)
        if _SURROGATE.search(content):
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        return values
    except UnicodeDecodeError as error:
        raise not_utf8(error, origin) from None
    except UnicodeEncodeError as error:
        got = f"half of one, {error.object[error.start]!a},"
        raise bad_row("a text must be whole characters", got, origin) from None
    except json.JSONDecodeError as error:
        place = origin if " line " in origin else f"{origin} line {error.lineno}"
        place += f" column {error.colno}"
        remedy = second if error.msg == "Extra data" else _CORRECT
        if content.strip() in (b"[", b"{"):  # the first line of what is indented
            remedy = "a file of one JSON value must end in .json"
        raise bad_row("data must be JSON", error.msg.removesuffix(" at"), place, remedy) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; deep nesting
        reason = str(error).partition(";")[0]
        raise bad_row("data must be JSON that can be read", reason, origin) from None
