"""The tables of a report: scores, paired differences, costs, savings, choices. Pure: from results
to `Table`s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chainlora.experiments.design.paper import paper_model, paper_savings
from chainlora.experiments.execution.records import Results
from chainlora.experiments.report.analysis import OVERALL, Comparison, Summary, digits
from chainlora.experiments.report.tables import Table, big, number


def scores_table(results: Results, summaries: Sequence[Summary]) -> Table:
    """Return mean ± sd by method (rows) and task (columns), the majority class, the paper's
    numbers."""
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
            rows.append(
                (f"paper: {method} ({paper_model(paper)})", *(_printed(summary) for summary in own))
            )
    heads = ("method", *(f"{task} ({_metric(summaries, task)})" for task in tasks))
    note = "Mean ± standard deviation over seeds (number of seeds). "
    if results.experiment.get("seed_keys", ["train.seed"]) == ["train.seed"]:
        note += (
            "Seeds vary the training alone: what other test rows would change is in no spread or "
            "interval here."
        )
    else:
        note += f"A seed sets {' and '.join(results.experiment['seed_keys'])}."
    return Table("Scores", heads, tuple(rows), note)


def others_table(summaries: Sequence[Summary]) -> Table | None:
    """Return the means of further metrics (exact match beside F1); None where there are none."""
    rows = tuple(
        (f"{s.task} {s.method}", name, number(value), str(s.num_seeds))
        for s in summaries
        for name, value in s.others.items()
    )
    return (
        Table("Further metrics", ("task and method", "metric", "mean", "n"), rows) if rows else None
    )


def _printed(summary: Summary | None) -> str:
    if summary is None or summary.paper is None:
        return "–"
    return number(summary.paper) + (
        f" ± {number(summary.paper_sd)}" if summary.paper_sd is not None else ""
    )


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


def differences_table(comparisons: Sequence[Comparison], value: str) -> Table:
    """Return the paired differences with intervals, tests and verdicts."""
    rows = tuple(
        (
            c.task,
            f"{c.method} − {c.rival}",
            str(d.num_pairs),
            number(d.mean, places, sign=True),
            number(d.sd, places),
            f"{number(d.low, places, sign=True)} to {number(d.high, places, sign=True)}",
            f"{d.p:.3g}",
            f"{d.p_holm:.3g}",
            f"{d.smallest_p_holm:.2g}",
            d.verdict,
        )
        for c in comparisons
        for d, places in [(c.difference, digits(c.metric))]
    )
    heads = (
        "task",
        "pair",
        "n",
        "difference",
        "sd",
        "95 % interval",
        "p",
        "Holm p",
        "smallest Holm p",
        "verdict",
    )
    note = (
        "Paired by seed; positive is better. Interval: BCa bootstrap of the mean (narrow under "
        "ten pairs)."
        " p: sign-flip test, two-sided, exact up to 40 pairs. Holm: over the tasks and pairs "
        "planned for this table,"
        " its rows for all tasks apart; smallest: what it would be if every one of them were as "
        "clear as its pairs"
        " allow. A verdict needs an interval without zero and Holm p ≤ 0.05."
    )
    if any(c.task == OVERALL for c in comparisons):
        note += (
            " All tasks: the mean of the tasks' means, over the seeds that all of them have. "
            "Hyper-parameters are"
            " chosen once a task and method: what another choice would change is in no interval."
        )
    return Table(f"Paired differences in {value}", heads, rows, note)


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
    rows = []
    for choice in results.choices:
        chosen = choice["chosen"]
        tried = "; ".join(
            f"{_point(t['point'])}: {number(t['mean'], 4) if t['mean'] is not None else 'diverged'}"
            for t in choice["tried"]
        )
        rows.append(
            (
                f"{choice['task']} {choice['method']}",
                _point(chosen) + _at_edges(choice) if chosen else "none",
                choice["metric"],
                tried,
            )
        )
    note = (
        "Lowest, highest tried: the chosen value is an end of its grid; a wider one might choose "
        "another."
        if any("tried)" in row[1] for row in rows)
        else ""
    )
    heads = ("task and method", "chosen", "by validation", "tried")
    return Table("Chosen hyper-parameters", heads, tuple(rows), note)


def _at_edges(choice: dict[str, Any]) -> str:
    """Return a remark where a chosen number is the least or the greatest of those tried."""
    ends = []
    for key, value in choice["chosen"].items():
        tried = [each["point"][key] for each in choice["tried"]]
        if (
            all(map(_is_number, tried))
            and value in (min(tried), max(tried))
            and min(tried) < max(tried)
        ):
            ends.append("lowest" if value == min(tried) else "highest")
    return f" ({', '.join(ends)} tried)" if ends else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point(point: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]} {value:g}"
        if _is_number(value)
        else f"{key.rpartition('.')[2]} {value}"
        for key, value in point.items()
    )


def savings_table(results: Results, summaries: Sequence[Summary]) -> Table | None:
    """Return the operations that rank step-down saves, ours and the paper's; None where the paper
    counts none."""
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
        rows.append(
            (f"{task} {method}", big(saved), "–" if theirs is None else big(theirs), f"{share:.3%}")
        )
    if not rows:
        return None
    heads = ("task and method", "6·N·D saved", "paper", "share of counted FLOPs saved")
    return Table(f"Operations saved against {rival}", heads, tuple(rows))
