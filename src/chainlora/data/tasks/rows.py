"""Rows from files or the Hub, each with the place it came from, so that a bad one can be named."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"^(?P<path>[\w.-]+/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")


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


def load_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Read all rows of a file, of a split in a folder, or of a Hub dataset.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a folder holding
            ``<split>.<suffix>``; or a Hub dataset as ``owner/name``, ``owner/name:config`` or
            ``owner/name@revision``.
        split: which split of a folder or Hub dataset; a file is one split already.

    Raises:
        DataError: missing, unreadable or empty source; a row that is not an object of named values
        (file and
            line are named).
    """
    path = Path(source)
    if path.is_dir():
        path = find_file(path, [split]) or _missing(path, split)
    if path.is_file():
        return _read_file(path)
    match = _HUB_ID.match(str(source))
    if match is None or path.suffix.lower() in SUFFIXES:
        raise DataError(
            f"data must be a file, a folder or a Hub dataset owner/name (got {source}, which is "
            "none of them); check the path"
        )
    return load_hub_rows(match["path"], split, name=match["name"], revision=match["revision"])


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the first ``<stem><suffix>`` in `folder`, or None."""
    candidates = (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def load_hub_rows(
    path: str,
    split: str,
    *,
    name: str | None = None,
    folder: str | None = None,
    revision: str | None = None,
) -> list[Row]:
    """Read one split of a Hub dataset; no code of the dataset is ever run.

    Args:
        path: ``owner/name``. name: the configuration, where the dataset declares some. folder: the
        folder inside the repository; branches of converted Parquet have one a configuration.
        revision: branch, tag or commit.
    """
    from datasets import load_dataset

    try:
        table = load_dataset(path, name, data_dir=folder, revision=revision, split=split)
    except Exception as error:  # the library raises a dozen unrelated types for "could not get it"
        reason = " ".join(str(error).split())[:200]
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            reason = "HF_HUB_OFFLINE is set and the dataset is not in the cache"
        raise DataError(
            f"Hub dataset {path} split {split!r} must be reachable (got: {reason}); go online, "
            "or name a local folder of rows (data.dir, --data DIR)"
        ) from error
    return _index(
        ((f"{path} {split} row {i}", row) for i, row in enumerate(table)), f"{path} split {split}"
    )


def _missing(folder: Path, split: str) -> Path:
    names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    raise DataError(
        f"a data folder must hold the split {split!r} as one of {names} (got {folder} without); "
        "name the file itself or rename it"
    )


def _read_file(path: Path) -> list[Row]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"a data file must end in {', '.join(SUFFIXES)} (got {path}); convert or rename it"
        )
    try:
        return _index(reader(path), str(path))
    except OSError as error:
        raise DataError(
            f"data file must be readable (got {path}: {error.strerror}); check it"
        ) from error


def _index(located: Iterable[tuple[str, Any]], source: str) -> list[Row]:
    rows: list[Row] = []
    for origin, values in located:
        if not isinstance(values, Mapping) or not values:
            raise DataError(
                f"a row must be an object of named values (got {_kind(values)} at {origin}); "
                "correct or remove it"
            )
        rows.append(Row(values, len(rows), origin))
    if not rows:
        raise DataError(f"data must hold at least one row (got none in {source}); check the file")
    return rows


def _kind(values: Any) -> str:
    return (
        "an empty object"
        if isinstance(values, Mapping)
        else f"{type(values).__name__} {values!r:.40}"
    )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:  # bytes: str.splitlines would also split at U+2028 inside a text
        for number, line in enumerate(lines, start=1):
            if line.strip():
                origin = f"{path} line {number}"
                yield origin, _parse(line.decode("utf-8-sig", errors="surrogateescape"), origin)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    tree = _parse(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"), str(path))
    if isinstance(tree, Mapping) and isinstance(tree.get("data"), list):
        tree = tree["data"]  # what pandas writes with orient="table"
    if not isinstance(tree, list):
        raise DataError(
            "a .json data file must hold a list of rows, or an object with the list under `data` "
            f"(got {type(tree).__name__} in {path}); one row a line is .jsonl"
        )
    yield from ((f"{path} row {number}", item) for number, item in enumerate(tree))


def _parse(text: str, origin: str) -> Any:
    try:
        text.encode("utf-8")
        return json.loads(text)
    except UnicodeEncodeError:
        raise DataError(
            f"data must be UTF-8 (got other bytes at {origin}); convert the file"
        ) from None
    except json.JSONDecodeError as error:
        place = origin if " line " in origin else f"{origin} line {error.lineno}"
        raise DataError(
            f"data must be JSON (got {error.msg} at {place} column {error.colno}); "
            "correct or remove it"
        ) from None


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                origin = f"{path} line {reader.line_num}"
                if None in values or None in values.values():
                    raise DataError(
                        f"a CSV row must have the header's {len(reader.fieldnames or [])} fields "
                        f"(got another number at {origin}); correct or remove it"
                    )
                yield origin, values
        except UnicodeDecodeError:
            raise DataError(
                f"data must be UTF-8 (got other bytes in {path} after line {reader.line_num}); "
                "convert the file"
            ) from None
        except csv.Error as error:
            place = f"{path} line {reader.line_num}"
            raise DataError(f"data must be CSV (got {error} at {place}); correct it") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data file must be Parquet (got {path}: {reason:.120}); write it anew"
        ) from None
    yield from ((f"{path} row {number}", values) for number, values in enumerate(table.to_pylist()))
