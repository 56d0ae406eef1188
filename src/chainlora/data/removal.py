"""Find rows of a data file by values of their columns, and write the file without them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

from chainlora.data.readers import READERS, CsvFile, parse_json
from chainlora.data.sources import FileSource, Row
from chainlora.errors import DataError, FileError
from chainlora.files import replaced_file

_BATCH = 1 << 16  # rows of a Parquet file that are copied at a time, which become one group


class FoundRows(NamedTuple):
    """Rows of a file that have some values."""

    path: Path
    total: int  # rows of the file
    numbers: list[int]  # of lines or rows, as in error messages
    rows: list[Row]

    @property
    def counted(self) -> str:
        """Return what `numbers` count: line (from 1) or row (from 0)."""
        return READERS[self.path.suffix.lower()][1]


def find_rows(path: str | Path, where: Sequence[tuple[str, str]]) -> FoundRows:
    """Find the rows of a file that have all values of `where`, pairs of column and value.

    Values are compared as text: ``"42"`` equals the numbers 42 and 42.0, ``"true"`` and ``"null"``
    equal JSON's.

    Raises:
        DataError: the file cannot be read, or no row has a column of `where`.
    """
    source = FileSource(Path(path))
    found, columns, total = list[Row](), dict[str, None](), 0
    for row in source:
        total += 1
        columns |= dict.fromkeys(row)
        if all(name in row and value in _texts(row[name]) for name, value in where):
            found.append(row)
    if missing := [name for name, _ in where if name not in columns]:
        rule = "rows are found by columns that the file has"
        got = f"{missing[0]!r}, which no row of {path} has"
        raise DataError(rule, got, f"its columns are {', '.join(columns)}")
    numbers = [int(row.origin.removeprefix(source.place)) for row in found]
    return FoundRows(source.path, total, numbers, found)


def _texts(value: object) -> tuple[str, ...]:
    """Return the texts that a value equals."""
    if value is None or isinstance(value, bool | list | dict):
        return (json.dumps(value, ensure_ascii=False, default=str),)
    # a column of whole numbers becomes floats when a table has a row without one
    is_whole = isinstance(value, float) and value.is_integer()
    return (str(value), str(int(value))) if is_whole else (str(value),)  # type: ignore[call-overload]


def check_target(path: Path, suffix: str) -> None:
    """Raise FileError if a file exists at `path`, or if its name does not end in `suffix`."""
    if path.exists() or path.is_symlink():
        raise FileError(f"Cannot write {path}: it exists. Name another file.")
    if path.suffix.lower() != suffix:
        raise FileError(f"Cannot write {path}: its rows are {suffix}. Name a file {suffix}.")


def write_without(found: FoundRows, output: Path) -> None:
    """Write the file without the rows that were found, in the same format.

    Lines of JSONL and CSV keep their bytes, a Parquet file its schema. Raises FileError if `output`
    exists.
    """
    suffix = found.path.suffix.lower()
    check_target(output, suffix)
    with replaced_file(output) as scratch, found.path.open("rb") as file:
        _WRITERS[suffix](file, found, scratch)


def write_found(found: FoundRows, output: Path) -> None:
    """Write the rows that were found as JSONL. Raises FileError if `output` exists."""
    check_target(output, ".jsonl")
    rows = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in found.rows)
    with replaced_file(output) as scratch:
        scratch.write_text("".join(rows), encoding="utf-8", newline="\n")


# --- one writer per format ---


def _write_jsonl(file: BinaryIO, found: FoundRows, target: Path) -> None:
    gone = {*found.numbers}
    with target.open("wb") as kept:
        kept.writelines(line for number, line in enumerate(file, start=1) if number not in gone)


def _write_csv(file: BinaryIO, found: FoundRows, target: Path) -> None:
    table, gone = CsvFile(file, found.path), {*found.numbers}
    rows = [(record.number, table.line) for record in table.rows() if record.number in gone]
    lines = {line for first, last in rows for line in range(int(first), last + 1)}
    with target.open("wb") as kept:
        mark, encoding = _bytes_of_text(file, table.encoding)
        kept.write(mark)
        table.text.seek(0)
        for number, line in enumerate(table.text, start=1):
            if number not in lines:
                kept.write(line.encode(encoding))


def _bytes_of_text(file: BinaryIO, encoding: str) -> tuple[bytes, str]:
    """Return the byte-order mark of a file, and the encoding that gives its bytes after it."""
    file.seek(0)
    head = file.read(3)
    if encoding == "utf-16":
        return head[:2], "utf-16-le" if head[:2] == codecs.BOM_UTF16_LE else "utf-16-be"
    if encoding == "utf-8-sig":
        return head if head == codecs.BOM_UTF8 else b"", "utf-8"
    return b"", encoding


def _write_json(file: BinaryIO, found: FoundRows, target: Path) -> None:
    tree = parse_json(file.read(), str(found.path))
    rows, gone = tree if isinstance(tree, list) else tree["data"], {*found.numbers}
    rows[:] = [row for number, row in enumerate(rows) if number not in gone]
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8", newline="\n")


def _write_parquet(file: BinaryIO, found: FoundRows, target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table, gone, number = pyarrow.parquet.ParquetFile(file), {*found.numbers}, count()
    with pyarrow.parquet.ParquetWriter(str(target), table.schema_arrow) as kept:
        for batch in table.iter_batches(batch_size=_BATCH):
            mask = [next(number) not in gone for _ in range(len(batch))]
            kept.write_batch(batch.filter(pyarrow.array(mask)))


_WRITERS = {".jsonl": _write_jsonl, ".json": _write_json, ".csv": _write_csv}
_WRITERS |= {".parquet": _write_parquet}
