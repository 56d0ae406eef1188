"""The text of a report, as Markdown: introduction, verdicts, methods. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.comparisons import Comparison
from chainlora.experiments.report.labels import base_note, labels, title
from chainlora.experiments.report.values import (
    OVERALL,
    digits,
    diverged_finals,
    missing_cells,
)
from chainlora.experiments.statistics.pairs import VERDICTS
from chainlora.reports.tables import number


def introduction(results: Results) -> str:
    """Return title, description, model, seeds, how keys were chosen, and what is missing."""
    head = results.experiment
    lines = [
        f"# {title(results)}",
        "",
        head["description"].strip() or "An experiment.",
        "",
        f"Model: {base_note(results)}. Seeds: {', '.join(map(str, head['seeds']))}. "
        f"{_how_chosen(results)}",
    ]
    missing, diverged = missing_cells(results), diverged_finals(results)
    if missing:
        lines += ["", f"**Not there yet** ({len(missing)}): {'; '.join(missing)}."]
    if diverged:
        names = "; ".join(f"{c['task']} {c['method']} seed {c['seed']}" for c in diverged)
        lines += ["", f"**Diverged** ({len(diverged)}): {names}."]
    return "\n".join(lines) + "\n"


def _how_chosen(results: Results) -> str:
    if not results.choices:
        return "No hyper-parameter was tuned: every method ran with the values of the file."
    tuning = results.experiment["tuning_seeds"]
    keys = dict.fromkeys(
        key for choice in results.choices for tried in choice["tried"] for key in tried["point"]
    )
    text = (
        "Chosen on validation rows for each task and method apart, never on test rows: "
        f"{', '.join(keys)} (tuning seeds: {', '.join(map(str, tuning))})."
    )
    shared = [str(seed) for seed in tuning if seed in results.experiment["seeds"]]
    if shared:
        text += f" Compared seeds that also chose: {', '.join(shared)}."
    themselves = {cell["task"] for cell in results.finals if cell["score_split"] == "validation"}
    if themselves:
        text += f" **The scores of {', '.join(sorted(themselves))} are of these same rows.**"
    return text


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """Return the verdicts in words: over all tasks, else of each; the primary one first."""
    if not comparisons:
        return ""
    whole = [c for c in comparisons if c.task == OVERALL]
    each = [c for c in comparisons if c.task != OVERALL]
    lines = ["## Verdict", ""]
    for comparison in sorted(whole or each, key=lambda c: not c.is_primary):
        lines.append(f"- {sentence(comparison)}{_tally(comparison, each) if whole else ''}")
    return "\n".join(lines) + "\n"


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict in one sentence: of the comparison that decides, else how many say what.

    That is the primary one; else those over all tasks; else all there are.
    """
    whole = [c for c in comparisons if c.task == OVERALL] or list(comparisons)
    chosen = [c for c in whole if c.is_primary] or whole
    if not chosen:
        return "Nothing is compared yet."
    if len(chosen) == 1:
        said = sentence(chosen[0])
        starts_with_a_name = said.startswith(f"{chosen[0].method} is ")
        return f"{said if starts_with_a_name else said[0].upper() + said[1:]}."
    place = " over all tasks" if chosen[0].task == OVERALL else ""
    counts = []
    for verdict in VERDICTS:
        own = [c for c in chosen if c.difference.verdict == verdict]
        if own:
            named = ", ".join(f"{c.method} against {c.rival}{_on(c)}" for c in own[:3])
            named += f" and {len(own) - 3} more" if len(own) > 3 else ""
            is_clear = verdict in ("wins", "loses")
            counts.append(f"{verdict} in {len(own)}" + f" ({named})" * is_clear)
    return f"{len(chosen)} comparisons{place}: {', '.join(counts)}."


def _on(comparison: Comparison) -> str:
    return "" if comparison.task == OVERALL else f" on {comparison.task}"


def sentence(comparison: Comparison) -> str:
    """Return a comparison in words, with its interval and p-value."""
    d, places = comparison.difference, digits(comparison.metric)
    place = "over all tasks" if comparison.task == OVERALL else f"on {comparison.task}"
    method, rival = comparison.method, comparison.rival
    words = {
        "wins": f"{method} is better than {rival} {place}",
        "loses": f"{method} is worse than {rival} {place}",
        "no difference found": f"no difference found between {method} and {rival} {place}",
        "too few pairs": f"too few pairs to compare {method} with {rival} {place}",
    }[d.verdict]
    primary = "Primary comparison: " if comparison.is_primary else ""
    what = comparison.value if comparison.task == OVERALL else comparison.metric
    difference = f"{what} {number(d.mean, places, sign=True)}"
    return f"{primary}{words}: {difference} ({comparison.better} is better; {evidence(comparison)})"


def evidence(comparison: Comparison) -> str:
    """Return the interval, the pairs, the p-values, and what so many pairs could have found."""
    d, places = comparison.difference, digits(comparison.metric)
    pairs = f"{d.num_pairs} pair{'s' * (d.num_pairs != 1)}"
    if d.interval == "none":
        return f"{pairs}: no interval and no verdict from so few"
    interval = f"{number(d.low, places, sign=True)} to {number(d.high, places, sign=True)}"
    test = f"{'exact' if d.exact else 'drawn'} p = {d.p:.3g}, Holm {d.p_holm:.3g}"
    found = f"95 % interval {interval}, {pairs}, {test}"
    if d.verdict == "too few pairs":
        return f"{found}, {d.smallest_p_holm:.2g} at best"
    if d.verdict == "no difference found":
        return f"{found}; {number(d.detectable, places)} would be found with 80 % power"
    return found


def _tally(whole: Comparison, each: Sequence[Comparison]) -> str:
    own = [c for c in each if (c.method, c.rival) == (whole.method, whole.rival)]
    counts = [(sum(c.difference.verdict == verdict for c in own), verdict) for verdict in VERDICTS]
    ahead = sum(c.is_ahead for c in own)
    said = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
    return f"; by task: {said}; ahead on {ahead} of {len(own)}"


def methods(results: Results) -> str:
    """Return what each method is, generated from the configs of its cells."""
    lines = [f"- **{name}**: {line}" for name, line in labels(results).items()]
    return "## Methods\n\n" + "\n".join(lines) + "\n"


def figure_links(figures: Sequence[str]) -> str:
    """Return the figures of a report as Markdown images."""
    drawn = [f"![{name[:-4]}]({name})" for name in figures if name.endswith(".png")]
    return "\n".join(drawn) + "\n" if drawn else ""
