"""A report from a results file alone: Markdown, HTML, CSV and LaTeX tables, PNG and SVG charts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chainlora.runs.paths import need_apart
from chainlora_lab.outputs import write_whole
from chainlora_lab.report.comparisons import Comparison, Facts
from chainlora_lab.report.pictures import CHARTS, Chart, asked_for, pictures, save_charts
from chainlora_lab.report.sections import SECTIONS
from chainlora_lab.report.values import Summary, finite
from chainlora_lab.report.verdicts import headline
from chainlora_lab.results import check_alike, read_results
from chainlora_pages import Column, Numbers, Page, Section, Table, markdown, render

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
class Report:
    """A report: its Markdown text, the files written, and what they were made from."""

    markdown: str
    files: list[Path]
    summaries: list[Summary]
    comparisons: list[Comparison]

    def json(self) -> dict[str, Any]:
        """Return the files written and every difference, with which side of 0 is better."""
        return {
            "files": [str(path) for path in self.files],
            "differences": [
                {key: finite(value) for key, value in _flat_comparison(each).items()}
                for each in self.comparisons
            ],
        }


def report_experiment(
    results: str | Path,
    out: str | Path | None = None,
    *,
    figures: bool = True,
    sections: Sequence[Callable[[Facts], Section]] = SECTIONS,
    charts: Sequence[Chart] = CHARTS,
) -> Report:
    """Make the report of a results file (or of the folder that holds ``results.jsonl``).

    Writes ``report.md``, ``report.html``, ``scores.csv``, ``differences.csv``, LaTeX of the same
    tables, held-out losses and costs, and the figures into `out`; None is the results' own folder.
    Without `figures` there is no ``report.html`` either. `sections` and `charts` are what it
    consists of: those of `sections.py` and `charts.py`, with some of your own.

    Raises:
        RunError: no such file, one that is damaged or of another format version, or cells that do
            not go together.
        ConfigError: scipy is not installed.
    """
    found = read_results(results)
    check_alike(found.cells)
    facts = Facts(found)
    path = Path(results)
    folder = Path(out) if out is not None else (path if path.is_dir() else path.parent)
    need_apart(folder / "report.md")
    title = f"{found.experiment['name']}: {', '.join(found.experiment['tasks'])}"
    page = Page(title, headline(facts.comparisons), [make(facts) for make in sections])
    folder.mkdir(parents=True, exist_ok=True)
    drawn, texts = dict[str, str](), dict[str, str]()
    if figures:
        wanted = asked_for(facts, charts)
        drawn = save_charts(facts, wanted, folder)
        on_page = []
        for each in page.sections:  # charts stand after its text, before its tables
            blocks = [*each.blocks, *pictures(facts, wanted, each.title)]
            blocks.sort(key=lambda block: isinstance(block, Numbers))
            on_page.append(Section(each.title, [Column("", blocks)]))
        texts["report.html"] = render(replace(page, sections=on_page))
    texts |= {"report.md": markdown(page, drawn)} | _tables(facts, page)
    for name, content in texts.items():
        write_whole(folder / name, content)
    images = [folder / Path(name).with_suffix(s) for name in drawn for s in (".png", ".svg")]
    files = [folder / name for name in texts] + images
    return Report(texts["report.md"], files, facts.summaries, facts.comparisons)


def _tables(facts: Facts, page: Page) -> dict[str, str]:
    """Return the files of tables: CSV, and LaTeX of those of the page that have a name."""
    scores = [
        asdict(s) | {"point": json.dumps(s.point), "ranks": " ".join(map(str, s.ranks))}
        for s in facts.summaries
    ]
    differences = [_flat_comparison(each) for each in [*facts.comparisons, *facts.losses]]
    texts = {"scores.csv": to_csv(scores), "differences.csv": to_csv(differences)}
    for block in (block for section in page.sections for block in section.blocks):
        if isinstance(block, Numbers) and block.name:
            texts[f"{block.name}.tex"] = latex(block.table)
    return texts


def _flat_comparison(comparison: Comparison) -> dict[str, Any]:
    values = asdict(comparison)
    values |= {"better": comparison.better} | values.pop("difference")
    return values


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
