"""What the verdict seeds came to: python benchmarks/field/table.py results.jsonl"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from chainlora_lab.statistics.intervals import t_interval

Cell = Mapping[str, Any]
ABOVE = 0.15  # more than the most frequent answer: a task that is learned alone
OUTSIDE = ("gsm8k", "dialogsum", "alpaca form")  # BoolQ is a task here


def learned_tasks(alone: Collection[Cell]) -> list[str]:
    """Return the tasks that each stage's own model has learned, mean of the seeds."""
    tasks = sorted(next(iter(alone))["right"])
    gained = {t: fmean(cell["right"][t] - cell["most"][t] for cell in alone) for t in tasks}
    return [task for task in tasks if gained[task] >= ABOVE]


def right(cell: Cell, tasks: Collection[str]) -> float:
    """Right answers in percent, the mean over tasks."""
    return 100 * fmean([cell["right"][task] for task in tasks] or [math.nan])


def forgotten(cell: Cell, tasks: Collection[str]) -> float:
    """Points lost since a task was learned, the mean over tasks."""
    lost = [cell["learned"][task] - cell["right"][task] for task in tasks]
    return 100 * fmean(lost or [math.nan])


def ratio(cell: Cell, base: Cell, kinds: Collection[str]) -> float:
    """Perplexity divided by the base's, the geometric mean over kinds of text."""
    own, other = cell["general"]["perplexity"], base["general"]["perplexity"]
    return math.exp(fmean(math.log(own[kind] / other[kind]) for kind in kinds))


def shown(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and its 95 % interval over seeds."""
    if not values:
        return "–"
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one seed)"
    low, high = t_interval(values)
    return f"{fmean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def arm_line(arm: str, cells: Sequence[Cell], base: Cell | None, tasks: Sequence[str]) -> str:
    """An arm as a line of the table."""
    rest = sorted({*cells[0]["right"]} - {*tasks})
    numbers = [f"{len(cells)}", shown([right(cell, tasks) for cell in cells])]
    numbers.append(shown([right(cell, rest) for cell in cells]) if rest else "–")
    numbers.append(
        f"{fmean(forgotten(c, tasks) for c in cells):.1f}" if cells[0]["learned"] else "–"
    )
    if base is None or "general" not in cells[0]:
        numbers += ["–"] * 3
    else:
        numbers += [f"{fmean(ratio(c, base, OUTSIDE) for c in cells):.3f}"]
        numbers += [f"{fmean(ratio(c, base, ['boolq']) for c in cells):.3f}"]
        facts = base["general"]["facts"]
        numbers += [f"{fmean(c['general']['facts'] for c in cells) / facts:.2f}"]
    one = cells[0]
    rank = "full" if one["rank"] is None else f"{one['rank']}"
    numbers.append(rank if one["adapters"] == 1 else f"{one['adapters']} of {rank}")
    numbers += [f"{one['steps']:,}", f"{one['old_rows']:,}"]
    numbers.append(f"{fmean(cell['cpu_seconds'] for cell in cells) / 3600:.2f}")
    return f"| {arm} | {' | '.join(numbers)} |"


def compared(
    arms: Mapping[str, Mapping[int, Cell]], other: str, value: Callable[[Cell], float]
) -> str:
    """Ours less another arm, paired over seeds."""
    seeds = sorted({*arms["ours"]} & {*arms.get(other, {})})
    differences = [value(arms["ours"][seed]) - value(arms[other][seed]) for seed in seeds]
    return f"{shown(differences)} (seeds {seeds})"


def main() -> None:
    """Print arms, tasks and the registered comparisons."""
    cells = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    arms: dict[str, dict[int, Cell]] = {}
    for cell in (cell for cell in cells if cell["split"] == "test"):
        arms.setdefault(cell["arm"], {})[cell["seed"]] = cell
    tasks = learned_tasks([*arms["alone"].values()])
    base = next(iter(arms.get("base", {}).values()), None)
    every = sorted(next(iter(arms["alone"].values()))["right"])
    print(f"learned alone: {', '.join(tasks)}")
    print(f"at chance: {', '.join(task for task in every if task not in tasks)}\n")
    heads = (
        "arm",
        "seeds",
        "right, %",
        "at chance, %",
        "forgotten",
        "perplexity",
        "BoolQ",
        "facts",
    )
    heads += ("rank", "steps", "old rows", "processor h")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for arm, by_seed in arms.items():
        print(arm_line(arm, [*by_seed.values()], base, tasks))
    print(f"\n| task | most frequent | {' | '.join(arms)} |\n|{'---|' * (len(arms) + 2)}")
    for task in every:
        most = fmean(cell["most"][task] for cell in arms["alone"].values())
        means = [fmean(c["right"][task] for c in by_seed.values()) for by_seed in arms.values()]
        print(f"| {task} | {' | '.join(f'{100 * each:.0f}' for each in (most, *means))} |")
    print()
    for name, other in (("primary", "replay"), ("second", "router")):
        print(f"{name}, ours less {other}: {compared(arms, other, lambda c: right(c, tasks))}")
        print(f"  over all tasks: {compared(arms, other, lambda c: right(c, every))}")
    trials = Counter(cell["arm"] for cell in cells if cell["split"] == "validation")
    chosen = {arm: next(iter(by_seed.values()))["settings"] for arm, by_seed in arms.items()}
    for arm, settings in chosen.items():
        print(f"{arm}: {trials[arm]} trials, chosen {settings}")


if __name__ == "__main__":
    main()
