"""The numbers of the long sequence in docs/evidence.md and README.md, from benchmarks/field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from benchmarks.helpers_evidence import Rows, from_yaml, lines, number
from benchmarks.helpers_evidence_stages import WORDS, script, three_seeds

NAMES = {  # how the page calls an arm
    "base": "the base",
    "alone": "each stage alone, its own rows",
    "ours": "layer by layer",
    "ours, rank 16": "layer by layer, rank 16",
    "replay": "on top, replay",
    "replay, no general rows": "on top, replay without general rows",
    "router": "router over the stages",
    "mean": "mean of the updates, scaled",
    "ties": "TIES",
    "one LoRA": "one LoRA in turn",
    "all at once": "one LoRA on all rows at once",
}
SHOWN = ("right, %", "below the gate, %", "forgotten", "perplexity", "facts", "rank", "processor h")


@cache
def arms() -> Mapping[str, Mapping[int, Any]]:
    return script("field/table.py").verdicts(lines("field/results.jsonl"))


@cache
def learned() -> list[str]:
    return script("field/table.py").learned_tasks([*arms()["alone"].values()])


def field() -> Rows:
    """The arms that have run, as benchmarks/field/table.py gives them."""
    table, base = script("field/table.py"), arms().get("base", {}).get(0)
    rows: Rows = [("arm", *(head.replace("rank", "exported rank") for head in SHOWN))]
    for arm, own in arms().items():
        line = table.arm_line(arm, [*own.values()], base, learned(), [])
        words = dict(zip(table.COLUMNS, line.strip("| ").split(" | "), strict=True))
        shown = [words[name].replace("-", "−") for name in SHOWN]
        rows.append((NAMES.get(arm, arm), *shown))
    return rows


def gaps(other: str, tasks: Sequence[str] = ()) -> list[float]:
    """Ours less another arm by seed, in points, over the tasks that are learned alone."""
    right, tasks = script("field/table.py").right, tasks or learned()
    ours, theirs = arms()["ours"], arms()[other]
    return [right(ours[s], tasks) - right(theirs[s], tasks) for s in sorted({*ours} & {*theirs})]


def compared(other: str) -> list[str]:
    """Ours less another arm with its interval over seeds and over tasks and rows, then by seed."""
    found = gaps(other)
    mean = three_seeds(found, 1, "+") if found[1:] else f"{number(found[0], 1)} (one seed)"
    return [mean, over_tasks(other), ", ".join(number(gap, 1) for gap in found)]


def ahead(other: str) -> str:
    """Another arm less ours, with its interval over seeds."""
    return three_seeds([-gap for gap in gaps(other)], 1)


def over_all(other: str) -> list[str]:
    """The number of all tasks, and ours less another arm over these."""
    tasks = [*arms()["alone"][0]["right"]]
    return [f"{len(tasks)}", three_seeds(gaps(other, tasks), 1, "+")]


def over_tasks(other: str) -> str:
    """The interval over tasks and rows too, as text."""
    table, both = script("field/table.py"), sorted({*arms()["ours"]} & {*arms()[other]})
    pair = ([arms()[arm][seed] for seed in both] for arm in ("ours", other))
    low, high = table.over_tasks(*pair, learned())
    return f"[{number(low, 1)}, {number(high, 1)}]"


def in_short(*names: str) -> list[str]:
    """The number of tasks that are learned alone, the number of seeds that all arms have, and what
    each arm has on these."""
    right = script("field/table.py").right
    seeds = sorted(set.intersection(*({*arms()[arm]} for arm in names)))
    means = [fmean(right(arms()[arm][seed], learned()) for seed in seeds) for arm in names]
    count = f"{WORDS[len(seeds)]} seed{'s' if seeds[1:] else ''}"
    return [f"{len(learned())}", count, *(number(mean, 0, "-") for mean in means)]


def worse(arm: str = "ours") -> list[float]:
    """By how many per cent perplexity of other text rises with an arm, by seed."""
    table, base = script("field/table.py"), arms()["base"][0]
    return [100 * (table.ratio(cell, base, table.OUTSIDE) - 1) for cell in arms()[arm].values()]


def below_the_gate(*tasks: str) -> list[str]:
    """How far a stage alone is above the most frequent answer, in points."""
    cells = arms()["alone"].values()
    gains = (fmean(cell["right"][task] - cell["most"][task] for cell in cells) for task in tasks)
    return [number(100 * gain, 1) for gain in gains]


def learned_at_the_end(*names: str) -> list[int]:
    table = script("field/table.py")
    return [len(table.learned_tasks([*arms()[name].values()])) for name in names]


def rate_of_replay() -> list[str]:
    """By how many of how many validation answers replay's rate was chosen over 1e-3."""
    trials = [cell for cell in lines("field/results.jsonl") if cell["split"] == "validation"]
    of_rate = {
        cell["settings"]["rate"]: fmean(cell["right"].values())
        for cell in trials
        if cell["arm"] == "replay" and cell["settings"]["replay"] == 1
    }
    rows = len(trials[0]["right"]) * script("field/tasks.py").SPLITS["validation"]
    return [f"{rows * (of_rate[3e-3] - of_rate[1e-3]):.0f}", f"{rows}"]


def not_run() -> str:
    """The arms that have no cell yet."""
    names = script("field/table.py").ARMS
    return "; ".join(NAMES.get(arm, arm) for arm in names if arm not in arms())


def learned_of_all() -> list[str]:
    tasks = next(iter(arms()["alone"].values()))["right"]
    return [f"{len(learned())}", f"{len(tasks)}"]


def gate() -> int:
    return round(100 * from_yaml("field/plan.yaml")["above"])


def planned() -> list[int]:
    """Rows of a task and steps of its stage, then those of CB, which has fewer rows."""
    rows, size = script("field/tasks.py").SPLITS["train"], 8
    cell = arms()["alone"][0]
    smaller = cell["steps"] - (len(cell["order"]) - 1) * (rows // size)
    return [rows, rows // size, smaller * size, smaller]
