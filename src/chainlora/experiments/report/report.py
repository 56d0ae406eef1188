"""A report from a results file alone: Markdown, HTML, CSV and LaTeX tables, PNG and SVG figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chainlora.experiments.execution.results import Results, check_alike, read_results
from chainlora.experiments.report.comparisons import Comparison, compare_all, compare_losses
from chainlora.experiments.report.gap import gap_ends, shares
from chainlora.experiments.report.machines import machines_table, provenance
from chainlora.experiments.report.report_tables import (
    choices_table,
    costs_table,
    differences_table,
    gap_table,
    others_table,
    savings_table,
    scores_table,
)
from chainlora.experiments.report.sections import figure_links, introduction, methods, verdicts
from chainlora.experiments.report.summaries import Summary, summarise_all
from chainlora.files import make_folder, write_text
from chainlora.reports.tables import Table, to_csv

_IN_LATEX = ("scores", "differences", "losses", "gap", "costs")


@dataclass(frozen=True)
class Report:
    """A report: its Markdown text, the files written, and what they were made from."""

    markdown: str
    files: list[Path]
    summaries: list[Summary]
    comparisons: list[Comparison]

    def json(self) -> dict[str, Any]:
        """Return the files written and every difference, with which sign of it is better."""
        return {
            "files": [str(path) for path in self.files],
            "differences": [
                {key: _finite(value) for key, value in _flat_comparison(each).items()}
                for each in self.comparisons
            ],
        }


def report_experiment(
    results: str | Path, out: str | Path | None = None, *, figures: bool = True
) -> Report:
    """Make the report of a results file (or of the folder that holds ``results.jsonl``).

    Writes ``report.md``, ``report.html``, ``scores.csv``, ``differences.csv``, LaTeX of the same
    tables, held-out losses and costs, and the figures into `out`; None is the results' own folder.
    Without `figures` there is no ``report.html`` either.

    Raises:
        RunError: no such file, one that is damaged or of another format version, or cells that do
            not go together.
        ConfigError: scipy is not installed.
    """
    found = read_results(results)
    check_alike(found.cells)
    path = Path(results)
    folder = Path(out) if out is not None else (path if path.is_dir() else path.parent)
    summaries, comparisons, losses = summarise_all(found), compare_all(found), compare_losses(found)
    tables = _tables(found, summaries, comparisons, losses)
    make_folder(folder)
    drawn = _draw(found, summaries, comparisons, folder) if figures else []
    texts = {
        "report.md": _markdown(found, comparisons, tables, [path.name for path in drawn]),
        "scores.csv": to_csv([_flat(summary) for summary in summaries]),
        "differences.csv": to_csv([_flat_comparison(each) for each in [*comparisons, *losses]]),
    }
    if figures:
        texts["report.html"] = _html(found, summaries, comparisons, tables)
    texts |= {f"{name}.tex": tables[name].latex() for name in _IN_LATEX if name in tables}
    for name, content in texts.items():
        write_text(folder / name, content)
    files = [folder / name for name in texts] + drawn
    return Report(texts["report.md"], files, summaries, comparisons)


def _tables(
    results: Results,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    losses: Sequence[Comparison],
) -> dict[str, Table]:
    """Return the tables that have rows, by name, in the order of the report."""
    made: dict[str, Table | None] = {
        "scores": scores_table(results, summaries),
        "differences": differences_table(comparisons, "score"),
        "others": others_table(summaries),
        "losses": differences_table(losses, "held-out loss", explained=False),
        "gap": gap_table(shares(results), gap_ends(results), _metrics(summaries)),
        "machines": machines_table(results),
        "costs": costs_table(summaries),
        "savings": savings_table(results, summaries),
        "choices": choices_table(results),
    }
    return {name: table for name, table in made.items() if table is not None and table.rows}


def _metrics(summaries: Sequence[Summary]) -> dict[str, str]:
    return {summary.task: summary.metric for summary in summaries}


def _draw(
    results: Results, summaries: Sequence[Summary], comparisons: Sequence[Comparison], folder: Path
) -> list[Path]:
    from matplotlib import rc_context

    from chainlora.experiments.report.figures import draw_figures

    with rc_context({"text.parse_math": False}):  # $ in a name is a dollar
        return draw_figures(results, summaries, comparisons, folder)


def _html(
    results: Results,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    tables: Mapping[str, Table],
) -> str:
    from chainlora.experiments.report.page import experiment_page
    from chainlora.reports.page import render

    return render(experiment_page(results, summaries, comparisons, tables))


def _markdown(
    results: Results,
    comparisons: Sequence[Comparison],
    tables: Mapping[str, Table],
    figures: Sequence[str],
) -> str:
    before = ("scores", "differences", "others", "losses", "gap", "machines")
    parts = [introduction(results), verdicts(comparisons)]
    parts += [tables[name].markdown() for name in before if name in tables]
    parts.append(figure_links(figures))
    parts += [tables[n].markdown() for n in ("costs", "savings", "choices") if n in tables]
    parts += [methods(results), provenance(results)]
    return "\n".join(part for part in parts if part)


def _flat(summary: Summary) -> dict[str, Any]:
    values = asdict(summary)
    return values | {
        "point": json.dumps(values["point"]),
        "ranks": " ".join(map(str, summary.ranks)),
    }


def _finite(value: Any) -> Any:
    """Return None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat_comparison(comparison: Comparison) -> dict[str, Any]:
    values = asdict(comparison)
    labels = ("task", "method", "rival", "value", "metric", "is_primary")
    return (
        {key: values[key] for key in labels} | {"better": comparison.better} | values["difference"]
    )
