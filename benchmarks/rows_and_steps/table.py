"""What the cells came to: python benchmarks/rows_and_steps/table.py [--phase tuning]

One line a cell: right answers, perplexity of other texts divided by the base's, and costs. Then the
protected and the best setting of each arm so far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import run
import yaml


def report(study: run.Study, phase: str) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    cells = [cell for cell in study.cells.values() if cell["phase"] == phase]
    bases = {cell["seed"]: cell for cell in cells if cell["arm"] == "base"}
    yield "| arm | seed | settings | right | tasks | outside | texts | seconds | GB | rank |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for cell in cells:
        yield row(cell, bases.get(cell["seed"]))
    for arm in dict.fromkeys(cell["arm"] for cell in cells if phase == "tuning"):
        of_arm = [c for c in cells if c["arm"] == arm and c["seed"] in bases and c["outside"]]
        for point, cell in study.choose(of_arm).items() if of_arm and arm != "base" else ():
            yield f"{arm}, {point} of {len(of_arm)}: {json.dumps(cell['settings'])}"


def row(cell: run.Cell, base: run.Cell | None) -> str:
    """Return the line of a cell."""
    settings = ", ".join(f"{key} {value}" for key, value in cell["settings"].items())
    right = 100 * run.mean_right(cell)
    tasks = ", ".join(f"{task} {100 * share:.0f}" for task, share in sorted(cell["right"].items()))
    mean, texts = "–", "–"
    if base is not None and cell["outside"]:
        mean = f"{run.outside(cell, base):.3f}"
        kinds: Sequence[str] = run.TEXTS
        texts = ", ".join(f"{cell['outside'][k] / base['outside'][k]:.2f}" for k in kinds)
    values = (cell["arm"], cell["seed"], settings, f"{right:.1f}", tasks, mean, texts)
    costs = cell["cpu_seconds"], cell["memory_gb"], cell["rank"]
    return f"| {' | '.join(map(str, (*values, *costs)))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", default="tuning")
    parser.add_argument("--results", type=Path, default=run.HERE / "results.jsonl")
    options = parser.parse_args()
    plan = yaml.safe_load((run.HERE / "plan.yaml").read_text())
    study = run.Study(plan, Path(), Path(), options.results)
    print(*report(study, options.phase), sep="\n")


if __name__ == "__main__":
    main()
