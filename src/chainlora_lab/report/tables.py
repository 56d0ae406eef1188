"""Tables as LaTeX and CSV, and large numbers in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from chainlora.reports import Table

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


def latex(table: Table) -> str:
    """Return a table as a LaTeX `table` with booktabs rules."""
    escapes = str.maketrans(_LATEX)
    rows = [
        " & ".join(cell.translate(escapes) for cell in row) for row in (table.heads, *table.rows)
    ]
    lines = [rf"{row} \\" for row in rows]
    columns = "r" * (len(table.heads) - 1)
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{table.title.translate(escapes)}}}"]
    begin += [rf"\begin{{tabular}}{{l{columns}}}", r"\toprule", lines[0], r"\midrule"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*begin, *lines[1:], *end])


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return records with equal keys as CSV, numbers in full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def big(value: float) -> str:
    """Return a large count with three digits, such as 1.23e+09."""
    return f"{value:.3g}" if value < 1e5 else f"{value:.2e}"
