"""A report from a results file alone: Markdown, CSV and LaTeX tables, PNG and SVG figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chainlora.experiments.execution.records import (
    Results,
    check_alike,
    read_results,
    write_atomically,
)
from chainlora.experiments.report.analysis import (
    OVERALL,
    Comparison,
    Summary,
    compare_all,
    compare_losses,
    digits,
    diverged_finals,
    missing_cells,
    summarise_all,
)
from chainlora.experiments.report.report_tables import (
    choices_table,
    costs_table,
    differences_table,
    others_table,
    savings_table,
    scores_table,
)
from chainlora.experiments.report.statistics import LEVEL
from chainlora.experiments.report.tables import Table, number, to_csv


@dataclass(frozen=True)
class Report:
    """A report: its Markdown text and the files written."""

    markdown: str
    files: list[Path]
    summaries: list[Summary]
    comparisons: list[Comparison]


def report_experiment(
    results: str | Path, out: str | Path | None = None, *, figures: bool = True
) -> Report:
    """Make the report of a results file (or of the folder that holds ``results.jsonl``).

    Writes ``report.md``, ``scores.csv``, ``differences.csv``, LaTeX of the same tables, held-out
    losses and costs, and the figures into `out`; None is the results' own folder.

    Raises RunError: no such file, one of another format version, or cells that do not go together.
    """
    found = read_results(results)
    check_alike(found.cells)
    path = Path(results)
    folder = Path(out) if out is not None else (path if path.is_dir() else path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    summaries, comparisons, losses = summarise_all(found), compare_all(found), compare_losses(found)
    tables = {
        "scores": scores_table(found, summaries),
        "differences": differences_table(comparisons, "score"),
        "losses": differences_table(losses, "held-out loss"),
        "costs": costs_table(summaries),
    }
    drawn: list[Path] = []
    if figures:
        from chainlora.experiments.report.figures import draw_figures

        drawn = draw_figures(found, summaries, comparisons, folder)
    text = _markdown(found, summaries, comparisons, losses, tables, [path.name for path in drawn])
    texts = {"report.md": text} | {
        f"{name}.tex": table.latex() for name, table in tables.items() if table.rows
    }
    texts["scores.csv"] = to_csv([_flat(summary) for summary in summaries])
    texts["differences.csv"] = to_csv([_flat_comparison(each) for each in [*comparisons, *losses]])
    for name, content in texts.items():
        write_atomically(folder / name, content)
    return Report(text, [folder / name for name in texts] + drawn, summaries, comparisons)


def _markdown(
    results: Results,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    losses: Sequence[Comparison],
    tables: dict[str, Table],
    figures: Sequence[str],
) -> str:
    parts = [
        _introduction(results),
        _verdicts(comparisons),
        tables["scores"].markdown(),
        tables["differences"].markdown(),
    ]
    others = others_table(summaries)
    if others is not None:
        parts.append(others.markdown())
    if losses:
        parts.append(tables["losses"].markdown())
    parts += [_figure_links(figures), tables["costs"].markdown()]
    saved = savings_table(results, summaries)
    if saved is not None:
        parts.append(saved.markdown())
    if results.choices:
        parts.append(choices_table(results).markdown())
    parts += [_methods(results), _provenance(results)]
    return "\n".join(part for part in parts if part)


def _introduction(results: Results) -> str:
    head = results.experiment
    lines = [
        f"# {head['name']}",
        "",
        head["description"].strip() or "An experiment.",
        "",
        f"Model: {head['model']}. Seeds: {', '.join(map(str, head['seeds']))}. "
        f"{_how_chosen(results)}",
    ]
    missing = missing_cells(results)
    diverged = diverged_finals(results)
    if missing:
        lines += ["", f"**Not there yet** ({len(missing)}): {'; '.join(missing)}."]
    if diverged:
        names = "; ".join(
            f"{cell['task']} {cell['method']} seed {cell['seed']}" for cell in diverged
        )
        lines += ["", f"**Diverged** ({len(diverged)}): {names}."]
    return "\n".join(lines) + "\n"


def _how_chosen(results: Results) -> str:
    if not results.choices:
        return "No hyper-parameter was tuned: every method ran with the values of the file."
    seeds = ", ".join(map(str, results.experiment["tuning_seeds"]))
    keys = ", ".join(
        dict.fromkeys(
            key for choice in results.choices for tried in choice["tried"] for key in tried["point"]
        )
    )
    themselves = {cell["task"] for cell in results.finals if cell["score_split"] == "validation"}
    warning = (
        f" **The scores of {', '.join(sorted(themselves))} are of these same rows.**"
        if themselves
        else ""
    )
    return (
        f"Chosen on validation rows for each task and method apart, never on test rows: {keys} "
        f"(tuning seeds: {seeds}).{warning}"
    )


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return ""
    whole = [c for c in comparisons if c.task == OVERALL]
    each = [c for c in comparisons if c.task != OVERALL]
    lines = ["## Verdict", ""]
    for comparison in whole or each:
        place = "over all tasks" if comparison.task == OVERALL else f"on {comparison.task}"
        lines.append(f"- {sentence(comparison, place)}{_tally(comparison, each) if whole else ''}")
    hopeless = [c for c in whole or each if c.difference.smallest_p_holm > LEVEL]
    if hopeless:
        best = max(c.difference.smallest_p_holm for c in hopeless)
        lines += [
            "",
            f"{len(hopeless)} of these could not have been decided: with so few pairs and so "
            "many comparisons Holm's p "
            f"is {best:.2g} at best.",
        ]
    return "\n".join(lines) + "\n"


def sentence(comparison: Comparison, place: str) -> str:
    """Return a comparison in words, with its interval and p-value."""
    d, places = comparison.difference, digits(comparison.metric)
    words = {
        "wins": "is better than",
        "loses": "is worse than",
        "undecided": "cannot be told apart from",
    }[d.verdict]
    return (
        f"{comparison.method} {words} {comparison.rival} {place}: "
        f"{number(d.mean, places, sign=True)} "
        f"(95 % interval {number(d.low, places, sign=True)} to "
        f"{number(d.high, places, sign=True)}, "
        f"{d.num_pairs} pair{'s' * (d.num_pairs != 1)}, {'exact' if d.exact else 'sampled'} p = "
        f"{d.p:.3g}, "
        f"Holm {d.p_holm:.3g})"
    )


def _tally(whole: Comparison, each: Sequence[Comparison]) -> str:
    own = [c.difference for c in each if (c.method, c.rival) == (whole.method, whole.rival)]
    counts = [
        f"{sum(d.verdict == verdict for d in own)} {verdict}"
        for verdict in ("wins", "loses", "undecided")
    ]
    ahead = sum(d.mean > 0 for d in own)
    return f"; by task: {', '.join(counts)}; ahead on {ahead} of {len(own)}"


def _figure_links(figures: Sequence[str]) -> str:
    return (
        "\n".join(f"![{name[:-4]}]({name})" for name in figures if name.endswith(".png")) + "\n"
        if figures
        else ""
    )


def _methods(results: Results) -> str:
    lines = [f"- **{name}**: {line}" for name, line in results.experiment["methods"].items()]
    return "## Methods\n\n" + "\n".join(lines) + "\n"


def _provenance(results: Results) -> str:
    finals = [cell for cell in results.cells if cell["status"] == "done"]
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in cell["versions"].items()) for cell in finals}
    )
    hardware = sorted({json.dumps(cell["hardware"], sort_keys=True) for cell in finals})
    seconds = sum({cell["cell"]: cell["wall_s"] for cell in finals}.values())
    return "\n".join(
        [
            "## Where this comes from",
            "",
            f"{len(finals)} cells, {seconds / 3600:.2f} hours of training and scoring in all.",
            *(f"Versions: {line}." for line in versions),
            *(f"Hardware: {line}." for line in hardware),
            "",
        ]
    )


def _flat(summary: Summary) -> dict[str, Any]:
    values = asdict(summary)
    return values | {
        "point": json.dumps(values["point"]),
        "ranks": " ".join(map(str, summary.ranks)),
    }


def _flat_comparison(comparison: Comparison) -> dict[str, Any]:
    values = asdict(comparison)
    return {key: values[key] for key in ("task", "method", "rival", "value")} | values["difference"]
