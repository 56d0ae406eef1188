"""Print cells as the tables of README.md: python benchmarks/stages/table.py results.jsonl"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from chainlora_lab.statistics.intervals import t_interval

HERE = Path(__file__).parent
COMPARISONS = [
    ("primary", "combined rehearsed", "on top rehearsed"),
    ("second", "on top rehearsed", "replay"),
]
Cell = dict[str, Any]


def main() -> None:
    """Read, and print the gate, what was chosen, the studies and the comparisons."""
    path = Path(sys.argv[1]) if sys.argv[1:] else HERE / "results.jsonl"
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    print("| task alone, tuning seed | right | most frequent answer |\n|---|---|---|")
    for cell in cells:
        for task, right in cell["right"].items() if "majority" in cell else ():
            print(f"| {task} | {right:.2f} | {cell['majority']:.2f} |")
    for study in plan["studies"]:
        mine = plan["defaults"] | study.get("change", {})
        found = {arm: of_arm(cells, study, mine, arm) for arm in study["arms"]}
        if any(found.values()):
            show(study, found)


def of_arm(
    cells: Sequence[Cell], study: Mapping[str, Any], settings: Mapping[str, Any], arm: str
) -> dict[int, Cell]:
    """Return the test cells of an arm in a study, by seed."""
    return {
        cell["seed"]: cell
        for cell in cells
        if (cell["arm"], cell["prompt"], cell["split"]) == (arm, study["prompt"], "test")
        and cell["seed"] in study["seeds"]
        and settings.items() <= cell["settings"].items()
    }


def show(study: Mapping[str, Any], found: Mapping[str, Mapping[int, Cell]]) -> None:
    """Print a study's arms, then its paired differences."""
    change = ", ".join(f"{key} {value}" for key, value in study.get("change", {}).items())
    print(f"\n**{study['name']}** ({study['prompt']} question{', ' + change if change else ''})\n")
    heads = "arm | seeds | average | forgetting | steps | old rows | CPU seconds | rates"
    print(f"| {heads} |\n|{'---|' * 8}")
    for arm, by_seed in found.items():
        if not (cells := [*by_seed.values()]):
            continue
        averages = [average(cell) for cell in cells]
        lost = [forgetting(cell) for cell in cells if cell["learned"]]
        chosen = cells[0]["settings"]
        row = [
            arm,
            str(len(cells)),
            interval(averages),
            interval(lost) if lost else "",
            *(
                f"{fmean(c[key] for c in cells):.0f}"
                for key in ("steps", "old_rows", "cpu_seconds")
            ),
            " ".join(f"{k} {chosen[k]:g}" for k in ("rate", "again", "scale") if k in chosen),
        ]
        print(f"| {' | '.join(row)} |")
    for name, arm, other in COMPARISONS:
        ours, theirs = found.get(arm, {}), found.get(other, {})
        both = sorted(ours.keys() & theirs.keys())
        if both:
            less = [average(ours[seed]) - average(theirs[seed]) for seed in both]
            each = ", ".join(f"{value:+.3f}" for value in less)
            print(f"\n{name}: {arm} less {other}: {interval(less, '+')} (by seed {each})")


def average(cell: Cell) -> float:
    """Return the mean over tasks at the end."""
    return fmean(cell["right"].values())


def forgetting(cell: Cell) -> float:
    """Return the mean over tasks of right after its own stage less at the end."""
    return fmean(cell["learned"][task] - cell["right"][task] for task in cell["learned"])


def interval(values: Sequence[float], sign: str = "") -> str:
    """Return a mean and, of six seeds, its 95 % t interval over seeds."""
    mean = f"{fmean(values):{sign}.3f}"
    if len(values) < 6:
        return mean
    low, high = t_interval(values)
    return f"{mean} ({low:{sign}.3f} to {high:{sign}.3f})"


if __name__ == "__main__":
    main()
