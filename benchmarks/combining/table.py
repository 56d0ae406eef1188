"""What the fresh seeds came to: python benchmarks/combining/table.py results.jsonl"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from chainlora_lab.statistics.intervals import t_interval

Cell = Mapping[str, Any]
TUNING = 100


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
    """The mean, and its 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one seed)" if values else "–"
    low, high = t_interval(values)
    return f"{fmean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Print the arms of the fresh seeds, and the registered comparisons."""
    cells = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    arms: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        if cell["seed"] != TUNING and cell["prompt"] == "shared":
            arms.setdefault(cell["arm"], {})[cell["seed"]] = cell
    print("| arm | seeds | right, % | perplexity, ratio | facts, ratio |\n|---|---|---|---|---|")
    for arm, by_seed in arms.items():
        found = [*by_seed.values()]
        numbers = (shown([*map(right, found)]), shown([*map(ratio, found)], 3))
        print(
            f"| {arm} | {len(found)} | {' | '.join(numbers)} | {shown([*map(facts, found)], 2)} |"
        )
    own, other = arms["layer by layer"], arms["default"]
    both = sorted({*own} & {*other})
    own_cells: list[Cell] = [own[seed] for seed in both]
    compared: dict[str, Callable[[int], float]] = {
        "primary, points": lambda seed: right(own[seed]) - right(other[seed]),
        "second, points": lambda seed: right(own[seed]) - alone(own[seed]),
    }
    print(f"seeds {both}; each stage alone {shown([*map(alone, own_cells)])}")
    for name, difference in compared.items():
        print(f"{name}: {shown([*map(difference, both)])}")
    print(f"third, ratio: {shown([*map(ratio, own_cells)], 3)}")


if __name__ == "__main__":
    main()
