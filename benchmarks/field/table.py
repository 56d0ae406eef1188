"""What the verdict seeds came to: python benchmarks/field/table.py results.jsonl

Cells may be missing: a figure that needs them is a dash, and the arms that lack them are named.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from chainlora_lab.statistics.intervals import t_interval

Cell = Mapping[str, Any]
Arms = Mapping[str, Mapping[int, Cell]]  # by arm and seed
PLAN = yaml.safe_load((Path(__file__).parent / "plan.yaml").read_text(encoding="utf-8"))
ARMS = ("base", "alone", "ours", "replay", "router", *PLAN["order"])
OUTSIDE = ("gsm8k", "dialogsum", "alpaca form")  # BoolQ is a task here
UNTOUCHED = ("wic", "copa", "cb", "boolq", "multirc")  # nothing was developed on them
TEST_ROWS = {"cb": 56}  # of all other tasks 100
RESAMPLES = 10_000
ENOUGH = 5  # learned tasks: with fewer, a comparison has no weight
COLUMNS = (
    *("arm", "seeds", "right, %", "any arm's, %", "below the gate, %", "forgotten", "perplexity"),
    *("BoolQ", "facts", "rank", "steps", "old rows", "processor h"),
)


# --- cells ---


def verdicts(cells: Collection[Cell]) -> dict[str, dict[int, Cell]]:
    """Return the cells of verdict seeds by arm and seed, in the order of the plan.

    Raises ValueError for two cells of an arm and a seed: they differ in settings.
    """
    found: dict[str, dict[int, Cell]] = {arm: {} for arm in ARMS}
    for cell in sorted((cell for cell in cells if cell["split"] == "test"), key=_seed):
        if found[cell["arm"]].setdefault(cell["seed"], cell) is not cell:
            raise ValueError(f"two cells of {cell['arm']}, seed {cell['seed']}")
    return {arm: by_seed for arm, by_seed in found.items() if by_seed}


def _seed(cell: Cell) -> int:
    return int(cell["seed"])


def learned_tasks(cells: Collection[Cell]) -> list[str]:
    """Return the tasks that the cells of an arm have learned at its end, mean of the seeds."""
    tasks = sorted(next(iter(cells))["right"]) if cells else []
    gained = {t: fmean(cell["right"][t] - cell["most"][t] for cell in cells) for t in tasks}
    return [task for task in tasks if gained[task] >= PLAN["above"] - 1e-9]  # but for rounding


def learned_by_any(arms: Arms) -> list[str]:
    """Return the tasks that some arm has learned; the base is none."""
    trained = [own for arm, own in arms.items() if arm != "base"]
    return sorted({task for own in trained for task in learned_tasks(own.values())})


# --- figures of a cell; NaN over no tasks ---


def right(cell: Cell, tasks: Collection[str]) -> float:
    """Right answers in percent, the mean over tasks."""
    return 100 * fmean([cell["right"][task] for task in tasks] or [math.nan])


def forgotten(cell: Cell, tasks: Collection[str]) -> float:
    """Points lost since a task was learned, the mean over tasks."""
    known = [task for task in tasks if task in cell["learned"]]
    lost = [cell["learned"][task] - cell["right"][task] for task in known]
    return 100 * fmean(lost or [math.nan])


def ratio(cell: Cell, base: Cell | None, kinds: Collection[str]) -> float:
    """Perplexity divided by the base's, the geometric mean over kinds of text."""
    if base is None or "general" not in cell:
        return math.nan
    own, other = cell["general"]["perplexity"], base["general"]["perplexity"]
    return math.exp(fmean(math.log(own[kind] / other[kind]) for kind in kinds))


def facts(cell: Cell, base: Cell | None) -> float:
    """Share of facts that are written, divided by the base's."""
    if base is None or "general" not in cell or not base["general"]["facts"]:
        return math.nan
    return float(cell["general"]["facts"] / base["general"]["facts"])


# --- how they are shown ---


def mean(values: Sequence[float], digits: int = 1) -> str:
    """The mean, or a dash where there is none."""
    found = fmean(values or [math.nan])
    return "–" if math.isnan(found) else f"{found:.{digits}f}"


def shown(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and its 95 % interval over seeds."""
    found = mean(values, digits)
    if len(values) < 2 or found == "–":
        return f"{found} (one seed)" if found != "–" else found
    low, high = t_interval(values)
    return f"{found} [{low:.{digits}f}, {high:.{digits}f}]"


def _line(words: Collection[str]) -> str:
    return f"| {' | '.join(words)} |"


def arm_line(
    arm: str, cells: Sequence[Cell], base: Cell | None, tasks: Sequence[str], more: Sequence[str]
) -> str:
    """An arm as a line of the table: over the learned `tasks`, over those that any arm learns."""
    one, rest = cells[0], sorted({*cells[0]["right"]} - {*tasks}) if tasks else []
    rank = "full" if one["rank"] is None else f"{one['rank']}"
    return _line(
        (
            *(arm, f"{len(cells)}"),
            *(shown([right(cell, some) for cell in cells]) for some in (tasks, more, rest)),
            shown([forgotten(cell, tasks) for cell in cells]),
            *(shown([ratio(c, base, kinds) for c in cells], 3) for kinds in (OUTSIDE, ("boolq",))),
            mean([facts(cell, base) for cell in cells], 2),
            rank if one["adapters"] == 1 else f"{one['adapters']} of rank {rank}",
            *(f"{fmean(c[key] for c in cells):,.0f}" for key in ("steps", "old_rows")),
            mean([cell["cpu_seconds"] / 3600 for cell in cells], 2),
        )
    )


def task_lines(arms: Arms, tasks: Sequence[str]) -> Iterator[str]:
    """The cells of each task in percent: their mean and, of several seeds, each."""
    yield _line(("task", "most frequent", *arms))
    yield f"|{'---|' * (len(arms) + 2)}"
    most = {seed: cell["most"] for own in arms.values() for seed, cell in own.items()}
    for task in tasks:
        columns = [[each[task] for each in most.values()]]
        columns += [[cell["right"][task] for cell in own.values()] for own in arms.values()]
        yield _line((task, *map(_cells, columns)))


def _cells(shares: Sequence[float]) -> str:
    each = " ".join(f"{100 * share:.0f}" for share in shares)
    return each if len(shares) == 1 else f"{100 * fmean(shares):.0f} ({each})"


# --- comparisons ---


def over_tasks(
    ours: Sequence[Cell], other: Sequence[Cell], tasks: Sequence[str]
) -> tuple[float, float]:
    """The 95 % interval of a difference over tasks and test rows, in points, by bootstrap.

    Tasks are resampled; of the rows of a task, which a cell has as one share, the number of right
    ones is drawn from a binomial distribution of that share. The seeds stay as they are: the other
    interval is over them. Both arms answer the same rows, but are drawn independently of each
    other, since cells do not pair their answers: the interval is rather too wide. Always the same.
    """
    draw = np.random.default_rng(0)
    pair = (ours, other)
    shares = np.array([[[cell["right"][t] for t in tasks] for cell in own] for own in pair])
    rows = np.array([TEST_ROWS.get(task, 100) for task in tasks])
    found = draw.binomial(rows, shares, (RESAMPLES, *shares.shape)) / rows
    by_task = (found[:, 0] - found[:, 1]).mean(1)  # resamples × tasks
    places = draw.integers(len(tasks), size=by_task.shape)
    means = 100 * np.take_along_axis(by_task, places, 1).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def compared(arms: Arms, other: str, tasks: Sequence[str], seeds: Collection[int]) -> str:
    """Ours less another arm, paired over seeds."""
    pairs = [arms.get(arm, {}) for arm in ("ours", other)]
    both = sorted({*pairs[0]} & {*pairs[1]} & {*seeds})
    if not both or not tasks:
        return "–"
    ours, theirs = ([by_seed[seed] for seed in both] for by_seed in pairs)
    differences = [right(a, tasks) - right(b, tasks) for a, b in zip(ours, theirs, strict=True)]
    low, high = over_tasks(ours, theirs, tasks)
    return f"{shown(differences)}; over tasks and rows [{low:.1f}, {high:.1f}] (seeds {both})"


def comparisons(arms: Arms, tasks: Sequence[str], every: Sequence[str]) -> Iterator[str]:
    """The registered comparisons; with later seeds, those of the first ones too."""
    new = [task for task in UNTOUCHED if task in every]
    words = f"over {', '.join(new)}, of which {len({*new} & {*tasks})} are learned: "
    spans = {"": tasks, "over all tasks, without weight: ": every}
    seeds = sorted({seed for own in arms.values() for seed in own})
    first = [seed for seed in seeds if seed in PLAN["seeds"]]
    if tasks and len(tasks) < ENOUGH:
        yield f"of no weight: {len(tasks)} tasks are learned, and {ENOUGH} are needed"
    for name, other in (("primary", "replay"), ("second", "router")):
        more = {words: new} if name == "primary" else {}
        for some in (seeds, first) if first != seeds else (seeds,):
            for over, span in (spans | more).items():
                yield f"{name}, ours less {other}, {over}{compared(arms, other, span, some)}"


# --- all ---


def missing(arms: Arms) -> Iterator[str]:
    """The arms that have not run, and those that lack seeds of the plan."""
    yield f"not run: {', '.join(arm for arm in ARMS if arm not in arms) or 'none'}"
    for arm, own in arms.items():
        wanted = PLAN["seeds"][:1] if arm == "base" else PLAN["seeds"]
        if lacking := [seed for seed in wanted if seed not in own]:
            yield f"{arm}: seeds {lacking} have not run"


def settings(cells: Collection[Cell], arms: Arms) -> Iterator[str]:
    """The trials of each arm, and what they chose."""
    trials = Counter(cell["arm"] for cell in cells if cell["split"] == "validation")
    for arm in ARMS:
        cell = next(iter(arms.get(arm, {}).values()), None)
        if cell or trials[arm]:
            yield f"{arm}: {trials[arm]} trials here" + (
                f", chosen {cell['settings']}" if cell else ""
            )


def routed(lines: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """The share of test rows that the router gives to their own task's model (routed.py)."""
    for line in lines:
        shares = line["routed"]
        each = ", ".join(f"{task} {100 * share:.0f}" for task, share in sorted(shares.items()))
        yield f"router, seed {line['seed']}: {100 * fmean(shares.values()):.1f} % to the right task"
        yield f"  {each}"


def report(cells: Collection[Cell], routes: Collection[Mapping[str, Any]] = ()) -> Iterator[str]:
    """Yield arms, tasks and the registered comparisons, line by line."""
    arms = verdicts(cells)
    tasks, more = learned_tasks([*arms.get("alone", {}).values()]), learned_by_any(arms)
    every = sorted(
        {task for own in arms.values() for cell in own.values() for task in cell["most"]}
    )
    base = next(iter(arms.get("base", {}).values()), None)
    if "alone" in arms:
        yield f"learned alone ({len(tasks)} of {len(every)}): {', '.join(tasks) or 'none'}"
        yield f"below the gate: {', '.join(task for task in every if task not in tasks) or 'none'}"
    else:
        yield "which tasks are learned is not known: no cell of `alone`"
    yield f"learned by any arm ({len(more)}): {', '.join(more) or 'none'}\n"
    yield from (_line(COLUMNS), f"|{'---|' * len(COLUMNS)}")
    yield from (arm_line(arm, [*own.values()], base, tasks, more) for arm, own in arms.items())
    yield from ("", *task_lines(arms, every), "", *comparisons(arms, tasks, every), "")
    yield from (*missing(arms), *routed(routes), *settings(cells, arms))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none where it is missing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    """Print the report of a file of results, with what `routed.py` has written beside it."""
    path = Path(sys.argv[1])
    print("\n".join(report(read(path), read(path.with_name("routed.jsonl")))))


if __name__ == "__main__":
    main()
