"""Read the records of a data file: one reader per format. Only `.json` files are loaded whole.

Every record has the number of its line or row, so that errors can name the place. The readers of
`datasets` and `pyarrow` for JSON and CSV are not used: they convert values (texts of dates and
numbers), fill missing keys with nulls, and do not report lines.
"""

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
    """Return the error about a bad row. `place` names the file and line."""
    return DataError(rule, f"{got} at {place}", remedy)


def _not_utf8(error: UnicodeDecodeError, place: str) -> DataError:
    """Return the error about a text that is not UTF-8, with its likely encoding."""
    name, got = "WINDOWS-1252", f"probably Latin-1 or Windows-1252, {_near(error)},"
    if error.object.startswith(_BOM_UTF16):
        name = got = "UTF-16"
    return bad_row("data must be UTF-8", got, place, f"convert it: iconv -f {name} -t UTF-8")


def _near(error: UnicodeDecodeError) -> str:
    """Return the text around a byte that is not UTF-8, in its line, decoded as Windows-1252."""
    before = error.object[max(0, error.start - 10) : error.start].rpartition(b"\n")[2]
    after = error.object[error.start : error.start + 10].splitlines()[0]
    return repr((before + after).decode("cp1252", "replace"))


class Record(NamedTuple):
    """One row before it is parsed."""

    number: int | str  # of the line or row
    payload: Any  # the bytes of a JSON line, or the values


def _read_jsonl(file: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):  # bytes: splitlines would split at U+2028 too
        if line.strip():
            yield Record(number, line)


def _read_json(file: BinaryIO, path: Path) -> Iterator[Record]:
    remedy = "if each line is a row, name the file .jsonl"
    tree = parse_json(file.read(), str(path), second=remedy)
    if isinstance(tree, Mapping) and isinstance(tree.get("data"), list):
        tree = tree["data"]  # pandas writes this with orient="table"
    if not isinstance(tree, list):
        rule = "a .json data file must hold a list of rows, or an object with the list under `data`"
        raise DataError(rule, f"{type(tree).__name__} in {path}", remedy)
    yield from map(Record, count(), tree)


class CsvFile:
    """A CSV file; its encoding and separator are detected from the bytes and the header."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.num_empty = 0  # skipped rows without any value, so far
        self.padded: list[str] = []  # column names with blanks around them
        self.encoding, self.near = _encoding(file)
        file.seek(0)
        self.text = TextIOWrapper(file, self.encoding, newline="")
        self.separator = ","
        self.line = 0  # the last line of the row that was read last; a row can have several

    def rows(self) -> Iterator[Record]:
        try:
            self.separator = _separator(self.text.readline())
            self.text.seek(0)
            reader = csv.reader(self.text, strict=True, delimiter=self.separator)
            header = next(reader, [])
            self.padded = [name for name in header if name != name.strip()]
            names = list(map(str.strip, header))
            _check_names(names, self.path)
            self.line = reader.line_num
            for values in reader:
                first, self.line = self.line + 1, reader.line_num
                if not any(map(str.strip, values)):
                    self.num_empty += bool(values)  # an empty line is no row
                    continue
                if len(values) != len(names):
                    rule = f"a CSV row must have the header's {len(names)} fields"
                    raise bad_row(rule, len(values), f"{self.path} line {first}")
                yield Record(first, dict(zip(names, values, strict=True)))
        except UnicodeDecodeError as error:
            rule = "a CSV file must be UTF-8, UTF-16 or Windows-1252"
            got = f"the byte {error.object[error.start]:#04x}"
            place = f"{self.path} after line {self.line}"
            raise bad_row(rule, got, place, "convert it: iconv -f NAME -t UTF-8") from None
        except csv.Error as error:
            place, remedy = f"{self.path} line {self.line + 1}", "correct it, or write JSON lines"
            raise bad_row("data must be CSV", error, place, remedy) from None

    def remark(self) -> str:
        """Return how the rows read so far differ from plain CSV (UTF-8, commas), or ""."""
        parts = {
            f"as {_ENCODINGS[self.encoding]}{self.near}": self.encoding != "utf-8-sig",
            f"separated by {_SEPARATORS[self.separator]}": self.separator != ",",
            f"without the blanks around {', '.join(map(repr, self.padded))}": self.padded,
            f"without {self.num_empty} empty row{'s' * (self.num_empty > 1)}": self.num_empty,
        }
        unusual = ", ".join(part for part, is_unusual in parts.items() if is_unusual)
        return f"{self.path}: read {unusual}" if unusual else ""


def _encoding(file: BinaryIO) -> tuple[str, str]:
    """Return the encoding of a file, which Excel may have saved, and a text as evidence for it."""
    head = file.read(3)
    if head == codecs.BOM_UTF8 or head[:2] in _BOM_UTF16:
        return ("utf-16" if head[:2] in _BOM_UTF16 else "utf-8-sig"), ""
    file.seek(0)
    try:  # reads all bytes: the first one that is not ASCII may be in the last row
        blocks = iter(lambda: file.read(_BLOCK), b"")
        deque(codecs.iterdecode(blocks, "utf-8"), maxlen=0)
    except UnicodeDecodeError as error:
        return "cp1252", f" ({_near(error)})"
    return "utf-8-sig", ""


def _separator(header: str) -> str:
    """Return the comma if the header has one, else the separator that gives the most fields."""
    fields = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in _SEPARATORS}
    return "," if fields[","] > 1 else max(fields, key=fields.__getitem__)


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
        got = f"{path}: {reason:.120}"
        raise DataError("data file must be Parquet", got, "write it again") from None


def without_filling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the nulls inside the objects of lists, which a table adds.

    All values of a table's column have one type. So the arguments of a tool call get a null for
    every argument of the other calls, and so do the properties of a tool. The nulls of the objects
    themselves are removed where they are read.
    """

    def cleaned(item: Any) -> Any:
        is_object = isinstance(item, dict)
        return {key: _without_nulls(part) for key, part in item.items()} if is_object else item

    return {
        name: list(map(cleaned, value)) if isinstance(value, list) else value
        for name, value in values.items()
    }


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
    ".csv": (lambda file, path: CsvFile(file, path).rows(), "line"),
    ".parquet": (_read_parquet, "row"),
}
"""Suffix → reader, and whether its numbers count lines or rows."""


def is_rows(path: str | Path) -> bool:
    """Return whether a path is a data file, by its suffix.

    A `.json` file must also begin with a list, as a config can be a JSON object.
    """
    file = Path(path)
    if file.suffix.lower() != ".json" or not file.is_file():
        return file.suffix.lower() in READERS
    with file.open("rb") as opened:
        return opened.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


# --- JSON ---


def parse_json(content: bytes, origin: str, second: str = _CORRECT) -> Any:
    """Parse a JSON text strictly. `second` is the remedy if a second value follows."""

    def with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):  # Python would take the last value
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise bad_row("the keys of a JSON object must differ", f"{twice!r:.60} twice", origin)
        return values

    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
        values = json.loads(text, object_pairs_hook=with_unique_keys)
        if _SURROGATE.search(content):
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        return values
    except UnicodeDecodeError as error:
        raise _not_utf8(error, origin) from None
    except UnicodeEncodeError as error:
        got = f"half a character, {error.object[error.start]!a},"
        raise bad_row("a text must be valid Unicode", got, origin) from None
    except json.JSONDecodeError as error:
        place = origin if " line " in origin else f"{origin} line {error.lineno}"
        place += f" column {error.colno}"
        remedy = second if error.msg == "Extra data" else _CORRECT
        if content.strip() in (b"[", b"{"):  # the first line of an indented value
            remedy = "if the file is one JSON value, name it .json"
        raise bad_row("data must be JSON", error.msg.removesuffix(" at"), place, remedy) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; deep nesting
        reason = str(error).partition(";")[0]
        raise bad_row("data must be JSON that Python can parse", reason, origin) from None
