"""A table: rows of text, as Markdown and for a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; the first column is text, the others are numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown with its title as a heading."""
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        lines = [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
            for cells in (self.heads, rule, *self.rows)
        ]
        return (
            f"### {self.title}\n\n"
            + "\n".join(lines)
            + "\n"
            + (f"\n{self.note}\n" if self.note else "")
        )


def table_of(title: str, records: Sequence[Mapping[str, str]], note: str = "") -> Table:
    """Return the table of records with equal keys: these are its heads."""
    heads = tuple(records[0]) if records else ()
    return Table(title, heads, tuple(tuple(record.values()) for record in records), note)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number for a table; a dash for none, and for what is not a number."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = 0.0 if round(value, digits) == 0 else value  # no −0.00
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")
