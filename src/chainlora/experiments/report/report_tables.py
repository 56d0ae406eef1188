"""The tables of a report. Pure functions from results to `Table`s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chainlora.experiments.design.paper import paper_model, paper_savings
from chainlora.experiments.execution.results import Results
from chainlora.experiments.report.comparisons import Comparison
from chainlora.experiments.report.gap import Share
from chainlora.experiments.report.summaries import Summary
from chainlora.experiments.report.values import OVERALL, digits, scale
from chainlora.reports.tables import Table, big, number


def scores_table(results: Results, summaries: Sequence[Summary]) -> Table:
    """Return mean ± sd by method (rows) and task (columns), the majority class, the paper's."""
    tasks = [task for task in results.experiment["tasks"] if any(s.task == task for s in summaries)]
    by = {(s.task, s.method): s for s in summaries}
    rows = []
    for method in results.experiment["methods"]:
        if any((task, method) in by for task in tasks):
            rows.append((method, *(_score(by.get((task, method))) for task in tasks)))
    majority = [next((s.majority for s in summaries if s.task == task), None) for task in tasks]
    if any(value is not None for value in majority):
        rows.append(("majority class", *(number(value) for value in majority)))
    paper = results.experiment.get("paper")
    for method in results.experiment["methods"]:
        own = [by.get((task, method)) for task in tasks]
        if any(summary is not None and summary.paper is not None for summary in own):
            label = f"paper: {method} ({paper_model(paper)})"
            rows.append((label, *(_printed(summary) for summary in own)))
    heads = ("method", *(f"{task} ({_metric(summaries, task)})" for task in tasks))
    note = f"Mean ± standard deviation over seeds (number of seeds). {_what_seeds_vary(results)}"
    return Table("Scores", heads, tuple(rows), note)


def _what_seeds_vary(results: Results) -> str:
    keys = results.experiment.get("seed_keys", ["train.seed"])
    if keys == ["train.seed"]:
        return (
            "Seeds vary the training alone: what other test rows would change is in no spread or "
            "interval here."
        )
    return f"A seed sets {' and '.join(keys)}."


def others_table(summaries: Sequence[Summary]) -> Table | None:
    """Return the means of further metrics (exact match beside F1); None where there are none."""
    rows = tuple(
        (f"{s.task} {s.method}", name, number(value), str(s.num_seeds))
        for s in summaries
        for name, value in s.others.items()
    )
    heads = ("task and method", "metric", "mean", "n")
    return Table("Further metrics", heads, rows) if rows else None


def _printed(summary: Summary | None) -> str:
    if summary is None or summary.paper is None:
        return "–"
    spread = f" ± {number(summary.paper_sd)}" if summary.paper_sd is not None else ""
    return number(summary.paper) + spread


def _metric(summaries: Sequence[Summary], task: str) -> str:
    summary = next(s for s in summaries if s.task == task)
    split = "" if summary.split == "test" else f", {summary.split}"
    return f"{summary.metric}{split}"


def _score(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    places = digits(summary.metric)
    spread = f" ± {number(summary.sd, places)}" if summary.num_seeds > 1 else ""
    return f"{number(summary.mean, places)}{spread} ({summary.num_seeds})"


def differences_table(
    comparisons: Sequence[Comparison], value: str, *, explained: bool = True
) -> Table:
    """Return the paired differences with intervals, tests and verdicts, and how to read them."""
    heads = (
        "task",
        "pair",
        "n",
        "difference",
        "better",
        "sd",
        "95 % interval",
        "p",
        "Holm p",
        "smallest Holm p",
        "detectable",
        "verdict",
    )
    rows = tuple(_difference_row(each) for each in comparisons)
    note = (
        "Paired by seed: the first method less the second; better: which sign is. "
        "Interval of the mean: Student's t for four to nine "
        "pairs, BCa bootstrap from ten, none below four. p: sign-flip test, two-sided, exact up to "
        "40 pairs. Holm: over the tasks and pairs planned for this table, its rows for all tasks "
        "apart; smallest: what it would be if every one of them were as clear as its pairs allow. "
        "Detectable: the difference that so many pairs of this spread find with 80 % power. Too "
        "few pairs: nothing could have been decided. No difference found: it could have been. "
        "Wins and loses need an interval without zero and Holm p ≤ 0.05."
    )
    if any(c.is_primary for c in comparisons):
        note += " *: the primary comparison, named beforehand and tested alone."
    if any(c.task == OVERALL for c in comparisons):
        note += (
            " All tasks: the mean of the tasks' means, over the seeds that all of them have. "
            "Hyper-parameters are chosen once a task and method: what another choice would change "
            "is in no interval."
        )
    title = f"Paired differences in {value}"
    return Table(title, heads, rows, note if explained else "Read as the table of scores.")


def _difference_row(comparison: Comparison) -> tuple[str, ...]:
    d, places = comparison.difference, digits(comparison.metric)
    interval = f"{number(d.low, places, sign=True)} to {number(d.high, places, sign=True)}"
    return (
        comparison.task,
        f"{comparison.method} − {comparison.rival}{' *' if comparison.is_primary else ''}",
        str(d.num_pairs),
        number(d.mean, places, sign=True),
        comparison.better,
        number(d.sd, places),
        "–" if d.interval == "none" else interval,
        f"{d.p:.3g}",
        f"{d.p_holm:.3g}",
        f"{d.smallest_p_holm:.2g}",
        number(d.detectable, places),
        d.verdict,
    )


def gap_table(
    shares: Sequence[Share], ends: tuple[str, str] | None, metrics: Mapping[str, str]
) -> Table | None:
    """Return the share of the gap between floor and ceiling that each method closes."""
    if not shares or ends is None:
        return None
    rows = tuple(
        (
            f"{s.task} {s.method}",
            str(s.num_seeds),
            f"{number(100 * s.mean, 1)} %",
            "–" if s.num_seeds < 4 else f"{number(100 * s.low, 1)} to {number(100 * s.high, 1)} %",
            number(s.gap, digits(metrics[s.task])),
        )
        for s in shares
    )
    heads = ("task and method", "n", "share", "95 % interval", "gap")
    note = f"0 %: {ends[0]}. 100 %: {ends[1]}. Gap: {ends[1]} less {ends[0]}, in score."
    return Table("Share of the gap", heads, rows, note)


def costs_table(summaries: Sequence[Summary]) -> Table:
    """Return what each method cost and where its losses ended."""
    rows = tuple(
        (
            f"{s.task} {s.method}",
            ", ".join(map(str, s.ranks)) or "–",
            big(s.num_trained),
            big(s.tokens),
            big(s.flops),
            big(s.flops_6nd),
            number(s.wall_s, 1),
            number(s.peak_rss_mb, 0),
            number(s.train_loss, 4),
            number(s.held_out_loss, 4),
            number(s.validation, digits(s.metric)),
        )
        for s in summaries
    )
    heads = (
        "task and method",
        "ranks",
        "trained",
        "tokens",
        "FLOPs",
        "6·N·D",
        "seconds",
        "peak MiB",
        "train loss",
        "held-out loss",
        "validation",
    )
    note = (
        "Means per run; seconds: the median, evaluation and pauses of the machine included."
        " Trained: parameters of the largest link. FLOPs: counted, forward and backward."
        " Tokens and FLOPs include what gradient starts read beside the steps."
        " 6·N·D: the paper's rule, N the parameters trained. Train loss: over the last tenth of "
        "the steps."
    )
    return Table("Cost", heads, rows, note)


def choices_table(results: Results) -> Table:
    """Return what was chosen on validation rows, and the scores it was chosen from."""
    rows = tuple(_choice_row(choice) for choice in results.choices)
    note = ""
    if any("tried)" in row[1] for row in rows):
        note = (
            "Lowest, highest tried: the chosen value is an end of its grid; a wider one "
            "(`tune.extend`) might choose another."
        )
    heads = ("task and method", "chosen", "by validation", "tried")
    return Table("Chosen hyper-parameters", heads, rows, note)


def _choice_row(choice: Mapping[str, Any]) -> tuple[str, ...]:
    chosen = choice["chosen"]
    return (
        f"{choice['task']} {choice['method']}",
        _point(chosen) + _at_edges(choice) if chosen else "none",
        choice["metric"] + _over_seeds(choice),
        "; ".join(_tried(each) for each in choice["tried"]),
    )


def _over_seeds(choice: Mapping[str, Any]) -> str:
    """Return of how many tuning seeds the point that was chosen is the best, where several ran."""
    values = [each.get("values") for each in choice["tried"]]
    if choice["chosen"] is None or not all(values):
        return ""
    sign = -1 if scale(choice["metric"]) == 1 else 1
    own = next(each["values"] for each in choice["tried"] if each["point"] == choice["chosen"])
    best = [
        max(sign * each for each in by_seed if each is not None)
        for by_seed in zip(*values, strict=True)
    ]
    agree = sum(v is not None and sign * v >= b for v, b in zip(own, best, strict=True))
    return f", best on {agree} of {len(own)} seeds"


def _tried(each: Mapping[str, Any]) -> str:
    mean = "diverged" if each["mean"] is None else number(each["mean"], 4)
    return f"{_point(each['point'])}: {mean}"


def _at_edges(choice: Mapping[str, Any]) -> str:
    """Return a remark where a chosen number is the least or the greatest of those tried."""
    ends = []
    for key, value in choice["chosen"].items():
        tried = [each["point"][key] for each in choice["tried"]]
        if not all(map(_is_number, tried)) or min(tried) == max(tried):
            continue
        if value in (min(tried), max(tried)):
            ends.append("lowest" if value == min(tried) else "highest")
    return f" ({', '.join(ends)} tried)" if ends else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]} {f'{value:g}' if _is_number(value) else value}"
        for key, value in point.items()
    )


def savings_table(results: Results, summaries: Sequence[Summary]) -> Table | None:
    """Return the operations that rank step-down saves, ours and the paper's; None for none."""
    rival, printed = paper_savings(results.experiment.get("paper"))
    by = {(s.task, s.method): s for s in summaries}
    rows = []
    for (task, method), summary in by.items():
        if method not in printed or (task, rival) not in by:
            continue
        full = by[task, rival]
        saved = full.flops_6nd - summary.flops_6nd
        share = (full.flops - summary.flops) / full.flops
        theirs = printed[method].get(task)
        paper = "–" if theirs is None else big(theirs)
        rows.append((f"{task} {method}", big(saved), paper, f"{share:.3%}"))
    if not rows:
        return None
    heads = ("task and method", "6·N·D saved", "paper", "share of counted FLOPs saved")
    return Table(f"Operations saved against {rival}", heads, tuple(rows))
