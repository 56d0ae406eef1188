"""A table once, in Markdown, CSV and LaTeX. Pure functions from rows of text to text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LATEX = {each: f"\\{each}" for each in "&%_#${}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "∞": r"$\infty$",
    "–": "--",
}


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

    def latex(self) -> str:
        """Return the table as a LaTeX `table` with booktabs rules."""
        body = [" & ".join(map(_escape, row)) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_escape(self.title)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.heads) - 1)}}}",
                r"\toprule",
                " & ".join(map(_escape, self.heads)) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def table_of(title: str, records: Sequence[Mapping[str, str]], note: str = "") -> Table:
    """Return the table of records with equal keys: these are its heads."""
    heads = tuple(records[0]) if records else ()
    return Table(title, heads, tuple(tuple(record.values()) for record in records), note)


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return records with equal keys as CSV, numbers in full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number for a table; a dash for none, and for what is not a number."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = 0.0 if round(value, digits) == 0 else value  # no −0.00
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def big(value: float) -> str:
    """Return a large count with three digits, such as 1.23e+09."""
    return f"{value:.3g}" if value < 1e5 else f"{value:.2e}"
