"""The first rows of an uploaded file, and its columns with questions and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from chainlora.config.data import ROW_FIELDS
from chainlora.data.encoding.encoder import USUAL_COLUMNS, detect_format
from chainlora.data.readers import is_rows
from chainlora.data.sources import FileSource, Row
from chainlora.errors import ConfigError, DataError
from chainlora_pages.page import Texts, render_part, section

_OWN = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
)  # formats, read without data.fields
PAIRS = (*_OWN, *USUAL_COLUMNS)
"""Columns that are recognised as question and answer, the first pair wins."""
_WHOLE = ("messages", "conversations")  # columns with a whole chat
_ROWS = 5
_LONGEST = 300  # characters of a cell


class Upload(NamedTuple):
    """The first rows of a file and its columns."""

    rows: list[Row]
    columns: list[str]

    @property
    def has_pairs(self) -> bool:
        """Return whether the rows are questions and answers in columns, not chats or texts."""
        return len(self.columns) > 1 and not {*_WHOLE} & {*self.columns}


def read_upload(file: str | Path) -> Upload:
    """Read the first rows of a file. Raises DataError for a file that is not rows."""
    path = Path(file)
    if not is_rows(path):
        rule = "a file of rows must end in .jsonl, .csv or .parquet, or be a .json of a list"
        raise DataError(rule, path.name, "convert it")
    rows = list(islice(FileSource(path), _ROWS))
    return Upload(rows, list(dict.fromkeys(str(column) for row in rows for column in row)))


def guess(columns: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the columns of question and answer by their names; None if they are not known."""
    named = {column.strip().lower(): column for column in reversed(columns)}
    for question, answer in PAIRS:
        if question in named and answer in named:
            return named[question], named[answer]
    return None, None


def fields_of(upload: Upload, question: str | None, answer: str | None) -> dict[str, str]:
    """Return `data.fields` for the chosen columns.

    Raises ConfigError if one is missing, or if both are the same.
    """
    if not upload.has_pairs or (question, answer) in _OWN:
        return {}
    if not (question or answer) and _is_known(upload.rows):
        return {}
    if not {question, answer} <= {*upload.columns} or question == answer:
        rule = "Choose the column of the questions and that of the answers"
        raise ConfigError(rule, remedy=f"the file has {', '.join(upload.columns)}")
    return {"question": str(question), "answer": str(answer)}


def _is_known(rows: Sequence[Row]) -> bool:
    """Return whether rows are of a format, such as texts."""
    try:
        return bool(detect_format(rows))
    except DataError:
        return False


def preview_html(upload: Upload, question: str | None, answer: str | None) -> str:
    """Return the first rows as a table; its heads say how each column is used."""
    used: Mapping[str | None, str] = {question: "question", answer: "answer"}
    read = ROW_FIELDS["alpaca"] if (question, answer) == _OWN[0] else ()
    parts = {column: used.get(column, "part of the question") for column in (*used, *read)}
    heads = [_head(name, parts.get(name, "ignored")) for name in upload.columns]
    if not upload.has_pairs:
        heads = upload.columns
    rows = [[_text(row.get(column)) for column in upload.columns] for row in upload.rows]
    title = f"The first {len(rows)} rows" if len(rows) > 1 else "The first row"
    return render_part([section(title, Texts(title, heads, rows))])


def _head(name: str, use: str) -> str:
    return name if name.lower() == use else f"{name} ({use})"


def _text(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
