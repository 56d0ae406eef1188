"""Rows and steps: cells of the study in README.md, computed where they are missing.

    PYTHONPATH=src python benchmarks/rows_and_steps/run.py --data path/to/data/sets \\
      --work runs/rows_and_steps --phase tuning --arm ours [--changes]

plan.yaml holds every choice. A cell is one line of results.jsonl. A killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / name) for name in ("field", "combining")]

from arms import ARMS, Case  # noqa: E402
from model import Scored, perplexities, right_by_task  # noqa: E402

from chainlora.runs.costs import hardware, versions  # noqa: E402

TEXTS = ("gsm8k", "dialogsum", "alpaca form")
Cell = dict[str, Any]


class Study:
    """The cells that are there, and the means to compute the others."""

    def __init__(self, plan: Mapping[str, Any], data: Path, work: Path, results: Path) -> None:
        self.plan, self.data, self.work, self.results = plan, data, work, results
        lines = results.read_text().splitlines() if results.exists() else []
        self.cells = {key_of(cell): cell for cell in map(json.loads, lines)}

    @cached_property
    def scored(self) -> Scored:
        return Scored(self.plan["model"], self.plan["train"]["dtype"], self.data)

    # --- cells ---

    def cell(self, phase: str, arm: str, seed: int, settings: Mapping[str, Any], kept: int) -> Cell:
        """Return a cell, computed where it is missing."""
        named = {"phase": phase, "arm": arm, "seed": seed, "kept": kept, "settings": dict(settings)}
        if (key := key_of(named)) in self.cells:
            return self.cells[key]
        tasks = [settings["task"]] if "task" in settings else self.tasks(phase)
        case = Case(self.plan, self.data, self.work, self.scored, seed, tasks, kept, settings)
        forget_peak()
        began = time.monotonic()
        made = ARMS[arm](case)
        memory = peak_memory()  # before scoring
        split = self.plan["phases"][phase]["split"]
        asked = {task: self.scored.encode(each[split]) for task, each in case.rows.items()}
        cell = named | {
            "order": case.order,
            "right": right_by_task(self.scored, made.models, asked),
            "most": {task: most(some) for task, some in asked.items()},
            "rows": {task: len(some) for task, some in asked.items()},
            "outside": None if arm == "alone" else self._outside(phase, made.models),
            **{"rank": made.rank, "cpu_seconds": round(made.seconds, 1), **made.more},
            **{"memory_gb": memory, "wall_seconds": round(time.monotonic() - began)},
            "machine": machine(),
        }
        self.cells[key] = cell
        with self.results.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(f"{fmean(cell['right'].values()):.3f} {cell['outside']} {key}", flush=True)
        return cell

    def tasks(self, phase: str) -> list[str]:
        of_phase = self.plan["phases"][phase].get("tasks")
        return of_phase or [task for tasks in self.plan["kinds"].values() for task in tasks]

    def _outside(self, phase: str, models: Any) -> dict[str, float]:
        first, count = self.plan["phases"][phase]["outside"]
        texts = {kind: self.scored.texts(kind, first, count) for kind in TEXTS}
        return perplexities(self.scored, models, texts) if count else {}

    # --- choices ---

    def tuned(self, arm: str, seed: int, *, changes: bool) -> list[Cell]:
        """Return the tuning cells of an arm: its grid, values beyond an edge, and changes."""
        of_arm, kept = self.plan["arms"][arm], self.plan["kept"]

        def run(settings: Mapping[str, Any]) -> Cell:
            return self.cell("tuning", arm, seed, settings, kept)

        defaults = of_arm.get("defaults", {})
        cells = [run(defaults | some) for some in multiplied(of_arm.get("grid", [{}]))]
        chosen = self.choose(cells) if defaults else {}
        points = [beyond(cells, cell["settings"], self.plan["most"]) for cell in chosen.values()]
        cells += [run(some) for of_point in points for some in of_point]
        point = self.choose(cells)["protected"]["settings"] if defaults else {}
        for some in of_arm.get("changes", ()) if changes else ():
            if "weight" not in some or point.get("general", "kl") == "kl":
                cells.append(run(point | some))
        return [*{key_of(cell): cell for cell in cells}.values()]

    def choose(self, cells: Sequence[Cell]) -> dict[str, Cell]:
        """Return the protected and the best one of cells, by the rule of README.md."""
        base = self.cell("tuning", "base", cells[0]["seed"], {}, self.plan["kept"])

        def pick(some: Sequence[Cell]) -> Cell:
            right = max(map(mean_right, some))
            equal = [c for c in some if mean_right(c) >= right - self.plan["within"] - 1e-9]
            return min(equal, key=lambda cell: outside(cell, base))

        inside = [cell for cell in cells if outside(cell, base) <= self.plan["bound"]]
        lowest = [min(cells, key=lambda cell: outside(cell, base))]
        return {"protected": pick(inside or lowest), "best": pick(cells)}

    def gate(self) -> Iterator[Cell]:
        """Yield each candidate alone, and again with three times the epochs if it misses."""
        for task in self.tasks("gate"):
            for times in (1, 3):
                keys = {"task": task, "times": times}
                (seed,) = self.plan["phases"]["gate"]["seeds"]
                cell = self.cell("gate", "alone", seed, keys, self.plan["kept"])
                yield cell
                if cell["right"][task] - cell["most"][task] >= 0.15 - 1e-9:
                    break

    def verdict(self, phase: str, arm: str, seed: int, kept: int) -> None:
        """Compute the points of an arm that the tuning seed has chosen: both, or the best one."""
        self.tuned(arm, self.tuning_seed, changes=True)
        for point in self.points(arm):
            self.cell(phase, arm, seed, self.settings(phase, arm, point), kept)

    def points(self, arm: str) -> list[str]:
        """Return the names of the settings at which an arm is judged."""
        found = ["protected", "best"] if arm in self.plan["both"] else ["best"]
        return [*found, *(["default"] if arm == "ours" else [])]

    def settings(self, phase: str, arm: str, point: str) -> dict[str, Any]:
        """Return the settings of an arm at a point of a verdict, chosen among its tuning cells."""
        of_phase = self.plan["phases"][phase].get("settings", {}).get(arm, {})
        defaults = self.plan["arms"][arm].get("defaults", {})
        if point == "default" or not defaults:
            return defaults | of_phase
        return self.choose(self.tuning_cells(arm))[point]["settings"] | of_phase

    def tuning_cells(self, arm: str) -> list[Cell]:
        """Return the cells that the choice of an arm is made from, as far as they are there."""
        named = ("tuning", arm, self.tuning_seed)
        return [c for c in self.cells.values() if (c["phase"], c["arm"], c["seed"]) == named]

    @property
    def tuning_seed(self) -> int:
        return self.plan["phases"]["tuning"]["seeds"][0]


def multiplied(grid: Sequence[Mapping[str, Sequence[Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the settings of a grid."""
    for values in grid:
        for some in product(*values.values()):
            yield dict(zip(values, some, strict=True))


def beyond(
    cells: Sequence[Cell], chosen: Mapping[str, Any], most: Mapping[str, Any] = {}
) -> list[dict[str, Any]]:
    """Return settings with a value beyond the edge of a grid where the chosen one is there.

    `most` are the largest values that there are.
    """
    found = []
    for key, value in chosen.items():
        alike = [c["settings"] for c in cells if {**c["settings"], key: value} == chosen]
        values = sorted({s[key] for s in alike}) if isinstance(value, int | float) else []
        if len(values) > 1 and value in (values[0], values[-1]) and value not in (0, most.get(key)):
            next_to = values[1] if value == values[0] else values[-2]
            more = value**2 / next_to if next_to else 2 * value
            more = round(more) if isinstance(value, int) else float(f"{more:.0e}")
            found.append({**chosen, key: more})
    return found


# --- figures of a cell ---


def mean_right(cell: Cell) -> float:
    return fmean(cell["right"].values())


def outside(cell: Cell, base: Cell) -> float:
    """Return the geometric mean of the ratios of perplexities to the base's; 1 without texts."""
    ratios = [value / base["outside"][kind] for kind, value in (cell["outside"] or {}).items()]
    return geometric_mean(ratios) if ratios else 1.0


def most(asked: Sequence[Any]) -> float:
    """Return the share of the most frequent answer."""
    answers = [row.references[0] for row in asked]
    return max(map(answers.count, answers)) / len(answers)


def key_of(cell: Mapping[str, Any]) -> str:
    names = ("phase", "arm", "seed", "kept", "settings")
    return json.dumps({name: cell[name] for name in names}, sort_keys=True)


# --- the machine ---


def forget_peak() -> None:
    """Let the peak memory of this process begin anew, where the system can."""
    if (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_memory() -> float:
    """Return the peak memory of this process since then, in GB; NaN where it is not known."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return round(int(found[1]) / 1e6, 2) if found else math.nan


@cache
def machine() -> dict[str, Any]:
    """Return what numbers may depend on, as this process began."""
    git = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False)
    return {"revision": found.stdout.strip(), **versions(), **hardware(torch.device("cpu"))}


def main() -> None:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--work", type=Path, required=True, help="what is trained")
    parser.add_argument("--phase", required=True, help="of plan.yaml")
    parser.add_argument("--arm", action="append", choices=[*ARMS], default=[])
    parser.add_argument("--seed", type=int, action="append", help="by default those of the phase")
    parser.add_argument("--changes", action="store_true", help="tuning: the changes too")
    parser.add_argument("--kept", type=int, help="rows of a stage, in a verdict")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine()
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    options.work.mkdir(parents=True, exist_ok=True)
    study = Study(plan, options.data, options.work.resolve(), options.results)
    seeds = options.seed or plan["phases"][options.phase]["seeds"]
    if options.phase == "gate":
        list(study.gate())
    for arm, seed in product(options.arm, seeds):
        if options.phase == "tuning":
            study.tuned(arm, seed, changes=options.changes)
        elif options.phase != "gate":
            study.verdict(options.phase, arm, seed, options.kept or plan["kept"])


if __name__ == "__main__":
    main()
