"""Show results in a terminal and a notebook: a short line, and a small HTML table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, TypeVar

from markupsafe import Markup

_MOST = 24  # keys or rows: about the lines of a terminal
_FEW = 3  # entries of a nested value
_LONGEST = 60  # characters of a text
_BLUE = "11, 92, 173"  # visible on white and black, with readable text on it

Value = TypeVar("Value")


class Shown(dict[str, Value]):
    """A dictionary whose repr fits on a screen, whatever its size."""

    def __repr__(self) -> str:
        return _short(self, _MOST)

    def _repr_html_(self) -> str:
        return table((), [(Markup("<b>{}</b>").format(k), _cell(v)) for k, v in self.items()])


def table(
    heads: Sequence[object],
    rows: Sequence[Sequence[object]],
    caption: str = "",
    shades: Sequence[Sequence[float]] = (),
    below: Sequence[str] = (),
) -> Markup:
    """Return a table as HTML without external resources; shows at most `_MOST` rows.

    Args:
        heads: column heads; empty for a table without heads.
        rows: the cells of each row; everything except `Markup` is escaped.
        caption: text above the table.
        shades: darkness of the background of each cell, 0 to 1.
        below: paragraphs below the table.
    """
    parts = [Markup("<caption>{}</caption>").format(caption)] if caption else []
    parts += [_row("th", heads)] if heads else []
    for cells, shades_of in zip_longest(rows[:_MOST], shades[:_MOST], fillvalue=()):
        parts.append(_row("td", cells, shades_of))
    if len(rows) > _MOST:
        parts.append(_row("td", [f"… {len(rows) - _MOST} more"]))
    paragraphs = [Markup("<p>{}</p>").format(text) for text in below]
    whole = Markup("<table>{}</table>").format(Markup("").join(parts))
    return whole + Markup("").join(paragraphs)


def _row(tag: str, cells: Sequence[object], shades: Sequence[float] = ()) -> Markup:
    row = Markup("")
    for cell, shade in zip_longest(cells, shades, fillvalue=0.0):
        style = f' style="background: rgba({_BLUE}, {shade:.2f})"' if shade else ""
        row += Markup(f"<{tag}{style}>{{}}</{tag}>").format(_text(cell))
    return Markup("<tr>{}</tr>").format(row)


def _cell(value: Any) -> object:
    """Return the cell of a value: a nested table for records, otherwise a short text."""
    if isinstance(value, Mapping) and value and all(map(_is_record, value.values())):
        value = [{"": name} | dict(record) for name, record in value.items()]
    if isinstance(value, list | tuple) and value and all(map(_is_record, value)):
        heads = [key for key, item in value[0].items() if not _is_long(item)]
        return table(heads, [[_cell(record.get(key, "")) for key in heads] for record in value])
    if isinstance(value, Mapping):
        few = [f"{key} {_text(item)}" for key, item in islice(value.items(), _FEW)]
        return ", ".join(few + ["…"] * (len(value) > len(few)))
    most = 10 * _LONGEST
    return f"{value[:most]}…" if isinstance(value, str) and len(value) > most else value


def _is_record(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_long(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, Mapping) and len(value) > _FEW)


def _text(value: object) -> object:
    """Return a short form of a value: text unchanged, numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else _short(value)


def _short(value: Any, most: int = _FEW) -> str:
    """Return a repr with the first entries of a value, and "…" for the others."""
    if isinstance(value, Mapping):
        entries = [f"{key!r}: {_short(item)}" for key, item in islice(value.items(), most)]
        return f"{{{_joined(entries, len(value))}}}"
    if isinstance(value, list | tuple):
        left, right = "[]" if isinstance(value, list) else "()"
        return f"{left}{_joined([_short(item) for item in value[:most]], len(value))}{right}"
    if hasattr(value, "shape"):
        return f"<{type(value).__name__} {' × '.join(map(str, value.shape))}>"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _joined(entries: Sequence[str], count: int) -> str:
    left = count - len(entries)
    return ", ".join([*entries, f"… {left} more"] if left else entries)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number as text for a table; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = 0.0 if round(value, digits) == 0 else value  # no −0.00
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")
