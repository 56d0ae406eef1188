"""How many test rows the router gives to their own task's model, by task, for its verdict cells:

    PYTHONPATH=src python benchmarks/field/routed.py --data path/to/data/sets --output runs/field

Cells do not hold it. It trains nothing where OUTPUT still has the stages of these cells, and writes
OUTPUT/routed.jsonl, which table.py reads beside the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import run
import torch
import yaml


def routed(runner: run.Runner, cell: dict[str, Any]) -> dict[str, float]:
    """Return the share of rows that go to the model of their own task."""
    case = run.Case(runner, cell["seed"], cell["settings"], cell["split"])
    route = run.ARMS["router"](case).models.route
    prompts = {task: [row.prompt for row in rows] for task, rows in case.scored.items()}
    return {task: fmean(own == task for own in route(task, ps)) for task, ps in prompts.items()}


def main() -> None:
    """Write a line for each verdict cell of the router."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plan", type=Path, default=run.HERE / "plan.yaml")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, output = yaml.safe_load(options.plan.read_text()), options.output.resolve()
    runner = run.Runner(plan, options.data, output)
    cells = [c for c in runner.cells.values() if (c["arm"], c["split"]) == ("router", "test")]
    lines = [{"seed": cell["seed"], "routed": routed(runner, cell)} for cell in cells]
    (output / "routed.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


if __name__ == "__main__":
    main()
