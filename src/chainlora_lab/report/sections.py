"""The sections of a report: texts and tables. A section is one function in `SECTIONS`.

A table with a `name` is written as LaTeX too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from chainlora.evaluation.metrics import is_higher_better
from chainlora_lab.report.comparisons import Facts
from chainlora_lab.report.origin import base_note, methods_table, mixed_origins, provenance
from chainlora_lab.report.values import (
    Summary,
    big,
    cells_of,
    digits,
    missing_cells,
    nothing_chosen,
    scale,
)
from chainlora_lab.report.verdicts import differences_table, does_rank_bind, tied_none, verdicts
from chainlora_lab.results import Results
from chainlora_pages import Numbers, Section, Table, Text, number, section, table_of

# --- question ---


def question(facts: Facts) -> Section:
    """Return description, model, seeds, how keys were chosen, and what is missing."""
    results, head = facts.results, facts.results.experiment
    parts = [
        head["description"].strip() or "An experiment.",
        f"Model: {base_note(results)}. Seeds: {', '.join(map(str, head['seeds']))}. "
        f"{_how_chosen(results)}",
    ]
    missing = missing_cells(results)
    diverged = [f"{c['task']} {c['method']} seed {c['seed']}" for c in results.diverged]
    diverged += [f"{task} {method} wherever tried" for task, method in nothing_chosen(results)]
    if missing:
        parts.append(f"**Not there yet** ({len(missing)}): {'; '.join(missing)}.")
    if diverged:
        parts.append(f"**Diverged** ({len(diverged)}): {'; '.join(diverged)}.")
    return section("Question", Text("\n\n".join(parts)))


def _how_chosen(results: Results) -> str:
    """Return what was chosen, by which rows, and whether scores are of these."""
    text = "No hyper-parameter was tuned: every method ran with the values of the file."
    if results.choices:
        tuning = results.experiment["tuning_seeds"]
        tried = [each["point"] for choice in results.choices for each in choice["tried"]]
        text = (
            "Chosen on validation rows for each task and method apart, never on test rows: "
            f"{', '.join(dict.fromkeys(key for point in tried for key in point))} "
            f"(tuning seeds: {', '.join(map(str, tuning))})."
        )
        if shared := [str(seed) for seed in tuning if seed in results.experiment["seeds"]]:
            text += f" Compared seeds that also chose: {', '.join(shared)}."
    themselves = set[str]()
    for cell in results.finals:
        train = cell["config"].get("train", {})  # a run may have chosen its end by these rows
        has_chosen = results.choices or train.get("keep_best") or train.get("early_stop")
        if has_chosen and cell["score_split"] == "validation":
            themselves.add(cell["task"])
    if themselves:
        text += f" **The scores of {', '.join(sorted(themselves))} are of the rows that chose.**"
    return text


# --- verdict ---


def verdict(facts: Facts) -> Section:
    """Return the verdicts in words, and the differences that they rest on."""
    losses = differences_table(facts.losses, "held-out loss", "Read as the table of scores.")
    mixed = "\n\n".join(mixed_origins(facts.results))
    soft = "\n\n".join([*does_rank_bind(facts), *tied_none(facts)])
    return section(
        "Verdict",
        Text(verdicts(facts.comparisons)) if facts.comparisons else None,
        Text(mixed) if mixed else None,
        Text(soft) if soft else None,
        Numbers(differences_table(facts.comparisons, "score"), name="differences"),
        Numbers(losses, name="losses"),
    )


# --- scores ---


def scores(facts: Facts) -> Section:
    return section(
        "Scores",
        Numbers(_scores_table(facts), name="scores"),
        Numbers(_others_table(facts.summaries)),
    )


def _scores_table(facts: Facts) -> Table:
    """Return mean ± sd by method (rows) and task (columns), and the majority class."""
    tasks, by = facts.tasks, {(s.task, s.method): s for s in facts.summaries}
    rows = [
        (method, *(_score(by.get((task, method))) for task in tasks))
        for method in facts.results.experiment["methods"]
        if any((task, method) in by for task in tasks)
    ]
    first = {task: next(s for s in facts.summaries if s.task == task) for task in tasks}
    majority = [next(s.majority for s in facts.summaries if s.task == task) for task in tasks]
    if any(value is not None for value in majority):
        rows.append(("majority class", *(number(value) for value in majority)))
    heads = ("method", *(f"{task} ({_metric(first[task])})" for task in tasks))
    keys = facts.results.experiment.get("seed_keys", ["train.seed"])
    varied = (
        "Seeds vary the training alone: what other test rows would change is in no spread or "
        "interval here."
        if keys == ["train.seed"]
        else f"A seed sets {' and '.join(keys)}."
    )
    note = f"Mean ± standard deviation over seeds (number of seeds). {varied}"
    return Table("Scores", heads, tuple(rows), " ".join([note, *_never_warm(facts)]))


def _never_warm(facts: Facts) -> Iterator[str]:
    """Return which methods have links no longer than the warm-up after a knot."""
    for each in facts.summaries:
        for cell in cells_of(facts.results, each.task, each.method)[:1]:
            train, later = cell["config"].get("train", {}), cell.get("link_steps", [])[1:]
            rise, shortest = train.get("restart_warmup_steps"), min(later, default=0)
            if rise is None and train.get("restart_schedule"):
                rise = train.get("warmup_steps")
            rise = rise or train.get("optimizer_options", {}).get("rise", 0)
            if 0 < shortest <= rise:
                yield (
                    f"**{each.method} on {each.task} is no fair rival**: links of {shortest} "
                    f"step{'s' * (shortest > 1)} end within the warm-up of {rise} after each "
                    "knot; train longer, or lower the warm-up."
                )


def _metric(summary: Summary) -> str:
    return summary.metric + ("" if summary.split == "test" else f", {summary.split}")


def _score(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    places = digits(summary.metric)
    spread = f" ± {number(summary.sd, places)}" if summary.num_seeds > 1 else ""
    of = f" of {summary.num_planned}" * (summary.num_seeds < summary.num_planned)
    return f"{number(summary.mean, places)}{spread} ({summary.num_seeds}{of})"


def _others_table(summaries: Sequence[Summary]) -> Table:
    """Return the means of further metrics (exact match beside F1)."""
    rows = tuple(
        (f"{s.task} {s.method}", name, number(value), str(s.num_seeds))
        for s in summaries
        for name, value in s.others.items()
    )
    return Table("Further metrics", ("task and method", "metric", "mean", "n"), rows)


# --- stages ---


def stages(facts: Facts) -> Section:
    """Return what ways to add data sets came to on each stage: means over seeds."""
    found = [(each, cells_of(facts.results, each.task, each.method)) for each in facts.summaries]
    note = (
        "At the end (right after the stage itself). Mean forgetting: how much worse the end is, "
        "mean over stages. General perplexity: of general rows at the end, divided by the base's. "
        "Exported rank: full means as wide as the modules."
    )
    rows = [_stages_row(each, cells) for each, cells in found if "stages" in cells[0]]
    heads = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "–") for key in heads} for row in rows]
    return section("By stage", Numbers(table_of("By stage", rows, note), name="stages"))


def _stages_row(summary: Summary, cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    times, places = scale(summary.metric), digits(summary.metric)
    row = {"task and method": f"{summary.task} {summary.method}"}
    lost = []
    for stage in [each["stage"] for each in cells[0]["stages"]]:
        own = [each for cell in cells for each in cell["stages"] if each["stage"] == stage]
        end = times * fmean(each["end"] for each in own)
        row[stage] = number(end, places)
        if all(each["own"] is not None for each in own):
            after = times * fmean(each["own"] for each in own)
            row[stage] += f" ({number(after, places)})"
            lost.append((after - end) * (1 if is_higher_better(summary.metric) else -1))
    row["mean forgetting"] = number(fmean(lost) if lost else None, places, sign=True)
    general = [cell["general"] for cell in cells if cell.get("general")]
    ratios = [math.exp(min(700, each["end"] - each["base"])) for each in general]
    row["general perplexity"] = number(fmean(ratios) if ratios else None, 3)
    rank, adapters = cells[0]["exported_rank"], cells[0]["adapters"]
    dense = "full" if adapters == 1 else f"{adapters} adapters"
    row["exported rank"] = dense if rank is None else str(rank)
    row["steps in all"] = big(fmean(cell["steps"] for cell in cells))
    return row


def curves(facts: Facts) -> Section:
    """Return where the charts of loss against steps stand."""
    return section("Loss against steps")


# --- cost and choices ---


def cost(facts: Facts) -> Section:
    """Return what each method cost and where its losses ended."""
    rows = [
        {
            "task and method": f"{s.task} {s.method}",
            "ranks": ", ".join(map(str, s.ranks)) or "–",
            "trained": big(s.num_trained),
            "tokens": big(s.tokens),
            "seconds": number(s.wall_s, 1),
            "peak MiB": number(s.peak_rss_mb, 0),
            "train loss": number(s.train_loss, 4),
            "held-out loss": number(s.held_out_loss, 4),
            "validation": number(s.validation, digits(s.metric)),
        }
        for s in facts.summaries
    ]
    note = (
        "Means per run; seconds: the median, evaluation and pauses of the machine included."
        " Trained: parameters of the largest link. Tokens include what gradient starts read beside"
        " the steps, except those of sequences. Train loss: over the last tenth of the steps."
    )
    return section("Cost", Numbers(table_of("Cost", rows, note), name="costs"))


def choices(facts: Facts) -> Section:
    """Return what was chosen on validation rows, and the scores it was chosen from."""
    rows = [_choice_row(choice) for choice in facts.results.choices]
    note = ""
    if any("tried)" in row["chosen"] for row in rows):
        note = (
            "Lowest, highest tried: the chosen value is an end of its grid; a wider one "
            "(`tune.extend`, or `--extend`) might choose another."
        )
    return section("Hyper-parameters", Numbers(table_of("Chosen hyper-parameters", rows, note)))


def _choice_row(choice: Mapping[str, Any]) -> dict[str, str]:
    chosen = choice["chosen"]
    return {
        "task and method": f"{choice['task']} {choice['method']}",
        "chosen": _point(chosen) + _at_edges(choice) if chosen else "none",
        "by validation": choice["metric"] + _over_seeds(choice),
        "tried": "; ".join(_tried(each) for each in choice["tried"]),
    }


def _over_seeds(choice: Mapping[str, Any]) -> str:
    """Return of how many tuning seeds the point that was chosen is the best, where several ran."""
    values = [each.get("values") for each in choice["tried"]]
    if choice["chosen"] is None or not all(values):
        return ""
    sign = 1 if is_higher_better(choice["metric"]) else -1
    own = next(each["values"] for each in choice["tried"] if each["point"] == choice["chosen"])
    best = [
        max((sign * each for each in by_seed if each is not None), default=0.0)
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
        if all(map(_is_number, tried)) and min(tried) < max(tried):
            ends += ["lowest"] * (value == min(tried)) + ["highest"] * (value == max(tried))
    return f" ({', '.join(ends)} tried)" if ends else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]} {f'{value:g}' if _is_number(value) else value}"
        for key, value in point.items()
    )


# --- what it is of ---


def methods(facts: Facts) -> Section:
    """Return what the experiment's file says of each method, and what its cells' configs do."""
    named = facts.results.experiment["methods"].items()
    lines = [f"- **{name}**: {said.removesuffix('.')}." for name, said in named]
    table = methods_table(facts.results)
    return section("Methods", Text("\n".join(lines)), Numbers(table))


def origin(facts: Facts) -> Section:
    return section("Where this comes from", Text(provenance(facts.results)))


SECTIONS: tuple[Callable[[Facts], Section], ...] = (
    question,
    verdict,
    scores,
    stages,
    curves,
    cost,
    choices,
    methods,
    origin,
)
