"""What the fresh seeds came to: python benchmarks/combining/table.py results.jsonl"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from chainlora_lab.statistics.intervals import t_interval

Cell = Mapping[str, Any]


def right(cell: Cell) -> float:
    """Right answers in percent, the mean over tasks."""
    return 100 * fmean(cell["right"].values())


def alone(cell: Cell) -> float:
    """The same of each stage's own model on its own rows."""
    return 100 * fmean(cell["learned"].values())


def ratio(cell: Cell) -> float:
    """Perplexity divided by the base's, the geometric mean over kinds of text."""
    own, base = cell["general"]["perplexity"], cell["base"]["perplexity"]
    return math.exp(fmean(math.log(own[kind] / base[kind]) for kind in own))


def facts(cell: Cell) -> float:
    """Share of facts that are written, divided by the base's."""
    return float(cell["general"]["facts"] / cell["base"]["facts"])


def shown(values: list[float], digits: int = 1) -> str:
    """The mean, and of three seeds or more its 95 % interval over them."""
    if not values:
        return "–"
    mean = f"{fmean(values):.{digits}f}"
    if len(values) < 3:
        return mean
    low, high = t_interval(values)
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def arms_of(cells: Iterable[Cell], seeds: Collection[int]) -> dict[str, dict[int, Cell]]:
    """The cells of some seeds by arm and seed.

    An arm has the settings that most of its cells have; others, of the study beside, are named by
    what they change.
    """
    mine = [c for c in cells if c["seed"] in seeds and c["prompt"] == "shared"]
    usual: dict[str, Mapping[str, Any]] = {
        arm: max(tried := [c["settings"] for c in mine if c["arm"] == arm], key=tried.count)
        for arm in dict.fromkeys(cell["arm"] for cell in mine)
    }
    arms: dict[str, dict[int, Cell]] = {}
    for cell in mine:
        own = usual[cell["arm"]]
        changed = [f"{k} {v}" for k, v in cell["settings"].items() if v != own.get(k)]
        arms.setdefault(", ".join([cell["arm"], *changed]), {})[cell["seed"]] = cell
    return arms


def main() -> None:
    """Print the arms and the registered comparisons of each try that has cells."""
    cells = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    plan = yaml.safe_load(Path(__file__).with_name("plan.yaml").read_text())
    for name in ("verdict", "second_try"):
        if arms := arms_of(cells, plan[name]["seeds"]):
            print(f"## {name}\n")
            print_arms(arms)
            print_comparisons(arms.get("layer by layer", {}), arms.get("default", {}))


def print_arms(arms: Mapping[str, Mapping[int, Cell]]) -> None:
    """Print a line for each arm."""
    print("| arm | seeds | right, % | perplexity, ratio | facts, ratio |\n|---|---|---|---|---|")
    for arm, by_seed in arms.items():
        found = [*by_seed.values()]
        numbers = (shown([*map(right, found)]), shown([*map(ratio, found)], 3))
        print(
            f"| {arm} | {len(found)} | {' | '.join(numbers)} | {shown([*map(facts, found)], 2)} |"
        )


def print_comparisons(own: Mapping[int, Cell], other: Mapping[int, Cell]) -> None:
    """Print the registered comparisons, over the seeds that both arms have."""
    both = sorted({*own} & {*other})
    own_cells: list[Cell] = [own[seed] for seed in both]
    compared: dict[str, Callable[[int], float]] = {
        "primary, points": lambda seed: right(own[seed]) - right(other[seed]),
        "second, points": lambda seed: right(own[seed]) - alone(own[seed]),
    }
    print(f"\nseeds {both}; each stage alone {shown([*map(alone, own_cells)])}")
    for name, difference in compared.items():
        print(f"{name}: {shown([*map(difference, both)])}")
    print(f"third, ratio: {shown([*map(ratio, own_cells)], 3)}\n")


if __name__ == "__main__":
    main()
