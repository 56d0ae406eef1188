"""The long sequence of the field, 14 tasks: ours, replay, a router, and merging methods.

    PYTHONPATH=src python benchmarks/field/run.py --data path/to/data/sets --output runs/field

README.md says what is compared, plan.yaml holds every choice. A cell is one line of
OUTPUT/results.jsonl. Kill it and start it again at will: runs and cells that are there are not
computed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import tasks as T
import torch
import yaml
from model import Models, Scored, Update, general, right_by_task
from product import Runs, kept_rows
from router import nearest

from chainlora import Link
from chainlora.data.examples import Example
from chainlora.runs.costs import hardware, versions
from chainlora.runs.state import OpenState
from chainlora_lab.ewc import EWC
from chainlora_lab.ways import COMBINERS
from chainlora_lab.ways.regularisers import OLoRA, Regulariser

HERE = Path(__file__).parent
FACTORS = {  # of a value beyond an edge; 0: none
    **{"rate": 3, "replay": 2, "scale": 2},
    **{"layer": 0, "rank": 0, "off_diagonal": 0, "passes": 0},
}


@dataclass
class Made:
    """What an arm has made: models, the state right after each task was learned, and its cost.

    `of_stages` says that this state is each stage's own model, as of all that merges them.
    """

    models: Models
    rank: int | None  # exported; None: as wide as the modules
    steps: int
    old_rows: int  # of finished tasks and of the base, read again: once each for every reading
    cpu: float
    ends: Mapping[str, Update] = field(default_factory=dict)
    adapters: int = 1
    of_stages: bool = False


@dataclass
class Case:
    """Rows and order of a seed, and the settings of a cell."""

    runner: Runner
    seed: int
    settings: Mapping[str, Any]
    split: str

    @cached_property
    def order(self) -> list[str]:
        plan = self.runner.plan["tuning"]
        some = plan["tasks"] if self.seed == plan["seed"] else T.PAPER
        return [task for task in T.order_of(self.seed) if task in some]

    @cached_property
    def rows(self) -> dict[str, dict[str, list[dict[str, str]]]]:
        found = {task: T.draw(self.runner.data, task, self.seed) for task in self.order}
        return {
            task: {split: T.written(task, rows) for split, rows in each.items()}
            for task, each in found.items()
        }

    @cached_property
    def train(self) -> dict[str, list[dict[str, str]]]:
        return {task: each["train"] for task, each in self.rows.items()}

    @cached_property
    def scored(self) -> dict[str, list[Example]]:
        encode = self.runner.scored.encode
        return {task: encode(each[self.split]) for task, each in self.rows.items()}

    # --- stages beside each other, which all merging arms share ---

    @property
    def name(self) -> str:
        return f"{self.seed}-beside"

    @cached_property
    def beside(self) -> OpenState:
        rate = self.runner.plan["rate"]
        return self.runner.runs.stages(self.name, self.train, self.seed, rate)

    @cached_property
    def links(self) -> dict[str, Sequence[Link]]:
        return {task: self.beside.at(task).links() for task in self.order}

    @cached_property
    def kept(self) -> dict[str, list[Example]]:
        return {task: kept_rows(self.beside, task) for task in self.order}

    @cached_property
    def steps(self) -> int:
        return sum(link.num_steps for links in self.links.values() for link in links)

    @property
    def in_turn(self) -> int:
        """Steps of all tasks, one after the other."""
        size = self.runner.plan["train"]["batch_size"]
        return sum(-(-len(rows) // size) for rows in self.train.values())

    @cached_property
    def trained_in(self) -> float:
        costs = self.runner.runs.costs(self.name)
        return sum(costs.get(task, 0.0) for task in self.order)


# --- arms: what the package does ---


def ours(case: Case) -> Made:
    """The package's default: stages beside each other, combined layer by layer."""
    links = case.beside.links()
    return combined(case, links, sum(case.runner.runs.costs(case.name).values()))


def ours_at_rank_16(case: Case) -> Made:
    """The same stages, combined again."""
    links, cpu = case.runner.runs.at_rank(16, case.beside)
    return combined(case, links, case.trained_in + cpu)


def combined(case: Case, links: Sequence[Link], cpu: float) -> Made:
    """A combination of the stages that are beside each other, by kept and general rows."""
    rank, old = sum(link.rank for link in links), sum(map(len, case.kept.values())) + 64
    return Made(Models({"": links}), rank, case.steps, old, cpu, of_stages=True)


def replay(case: Case, *, general: bool = True) -> Made:
    """Stages on top of each other that read kept rows of the earlier ones, and general rows."""
    s, runs = case.settings, case.runner.runs
    name = f"{case.seed}-replay-{s['replay']:g}-{s['rate']:g}" + ("" if general else "-alone")
    share = s["replay"]
    state = runs.stages(name, case.train, case.seed, s["rate"], replay=share, general=general)
    ends = {task: state.at(task).links() for task in case.order}
    links = ends[case.order[-1]]
    size = case.runner.plan["train"]["batch_size"]
    readers = links if general else links[1:]
    old = sum(int(link.num_steps * size * s["replay"] + 1e-9) for link in readers)
    steps = sum(link.num_steps for link in links)
    ranks = sum(link.rank for link in links)
    return Made(Models({"": links}), ranks, steps, old, sum(runs.costs(name).values()), ends)


def alone(case: Case) -> Made:
    """Each stage's own model on its own rows: an oracle as router."""
    models = Models(dict(case.links), lambda task, prompts: [task] * len(prompts))
    return Made(models, 8, case.steps, 0, case.trained_in, adapters=len(case.order))


def router(case: Case) -> Made:
    """Each stage's own model behind the nearest centroid of hidden states of the base."""
    layer, began = case.settings["layer"], time.process_time()
    prompts = {task: [each.prompt for each in rows] for task, rows in case.kept.items()}
    scored = case.runner.scored

    def features(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        scored.put({})
        return scored.means(rows, layer)

    route = nearest(features, prompts)
    cpu = case.trained_in + time.process_time() - began
    old = sum(map(len, prompts.values()))
    models, count = Models(dict(case.links), route), len(case.order)
    return Made(models, 8, case.steps, old, cpu, adapters=count, of_stages=True)


def at_once(case: Case) -> Made:
    """One LoRA on the rows of all tasks, mixed."""
    s, runs = case.settings, case.runner.runs
    name = f"{case.seed}-all-{s['rank']}-{s['rate']:g}"
    links = runs.at_once(name, case.train, case.seed, s["rate"], s["rank"]).links()
    steps = sum(link.num_steps for link in links)
    return Made(Models({"": links}), s["rank"], steps, 0, sum(runs.costs(name).values()))


def base(case: Case) -> Made:
    """The base as it is."""
    return Made(Models({"": []}), 0, 0, 0, 0.0)


# --- arms: one task after the other, by the lab's regularisers ---


def in_turn(make: Callable[..., Regulariser], *keys: str) -> Callable[[Case], Made]:
    """Return the arm of a regulariser, of which `keys` are settings."""

    def arm(case: Case) -> Made:
        s, runs = case.settings, case.runner.runs
        name = "-".join([str(case.seed), *keys, *(f"{s[key]:g}" for key in sorted(s))])
        regulariser = make(**{key: s[key] for key in keys})
        ends = runs.in_turn(name, case.train, case.seed, s["rate"], regulariser)
        links = ends[case.order[-1]]
        # once, for the Fisher information
        old = sum(map(len, case.kept.values())) if "penalty" in keys else 0
        rank, cpu = sum(link.rank for link in links), sum(runs.costs(name).values())
        return Made(Models({"": links}), rank, case.in_turn, old, cpu, ends)

    return arm


# --- arms: merged by the lab's combiners ---


def merged(name: str, key: str) -> Callable[[Case], Made]:
    """Return the arm of a combiner, of which `key` is the setting."""

    def arm(case: Case) -> Made:
        scored, reads = case.runner.scored, key != "scale"
        kept = case.kept if reads else {}
        rows = {task: [row.sequences[0] for row in some] for task, some in kept.items()}
        scored.put({})
        began = time.process_time()
        update = COMBINERS[name](scored.model, case.links, rows, **{key: case.settings[key]})
        cpu = case.trained_in + time.process_time() - began
        old = sum(map(len, rows.values()))
        return Made(Models({"": update}), None, case.steps, old, cpu, of_stages=True)

    return arm


ARMS: dict[str, Callable[[Case], Made]] = {
    "base": base,
    "ours": ours,
    "replay": replay,
    "alone": alone,
    "router": router,
    "mean": merged("mean", "scale"),
    "ties": merged("ties", "scale"),
    "one LoRA": in_turn(Regulariser),
    "all at once": at_once,
    "O-LoRA": in_turn(OLoRA, "orthogonal"),
    "EWC": in_turn(EWC, "penalty"),
    "RegMean++": merged("regmean", "off_diagonal"),
    "IterIS": merged("iteris", "passes"),
    "ours, rank 16": ours_at_rank_16,
    "replay, no general rows": partial(replay, general=False),
}
TUNED_AS = {"replay, no general rows": "replay"}  # arms without tuning of their own
DEFAULTS: dict[str, dict[str, Any]] = {
    "replay": {"replay": 0.5, "rate": 1e-3},
    "router": {"layer": 15},
    "mean": {"scale": 1.0},
    "ties": {"scale": 1.0},
    "one LoRA": {"rate": 1e-3},
    "all at once": {"rate": 1e-3, "rank": 16},
    "O-LoRA": {"orthogonal": 0.5, "rate": 1e-3},
    "EWC": {"penalty": 1e4, "rate": 1e-3},
    "RegMean++": {"off_diagonal": 0.9},
    "IterIS": {"passes": 1},
}
FIRST = ("alone", "ours", "replay", "router")


class Runner:
    """The cells that are there, and the means to compute the others."""

    def __init__(self, plan: Mapping[str, Any], data: Path, output: Path) -> None:
        self.plan, self.data, self.results = plan, data, output / "results.jsonl"
        self.runs = Runs(output, {k: plan[k] for k in ("model", "epochs", "train")}, plan["kept"])
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        self.cells = {_key(cell): cell for cell in map(json.loads, lines)}

    @cached_property
    def scored(self) -> Scored:
        return Scored(self.plan["model"], self.plan["train"]["dtype"], self.data)

    def all(self) -> Iterator[Callable[[], object]]:
        """Yield what computes cells, in the order of the plan."""
        yield lambda: self.choose("replay")
        yield lambda: self.choose("router")
        for seed in self.plan["seeds"]:
            for arm in FIRST:
                yield lambda arm=arm, seed=seed: self.verdict(arm, seed)
        yield lambda: self.verdict("base", self.plan["seeds"][0])
        for arm in self.plan["order"]:
            if arm in ARMS:
                for seed in self.plan["seeds"]:
                    yield lambda arm=arm, seed=seed: self.verdict(arm, seed)
        for seed in self.plan["later_seeds"]:
            for arm in FIRST:
                yield lambda arm=arm, seed=seed: self.verdict(arm, seed)

    def verdict(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the cell of an arm with what the tuning seed has chosen for it."""
        return self.cell(arm, seed, self.choose(TUNED_AS.get(arm, arm)), "test")

    def choose(self, arm: str) -> dict[str, Any]:
        """Return the settings of most right validation answers, the first of equal ones."""
        chosen = dict(DEFAULTS.get(arm, {}))
        for grid in self.plan["grids"].get(arm, []):
            best = self._best(arm, chosen, grid)
            for key, values in grid.items():
                if more := beyond(key, values, best[key]):
                    best = self._best(arm, chosen, {key: [best[key], *more]})
            chosen |= best
        return chosen

    def _best(self, arm: str, chosen: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
        choices = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        seed = self.plan["tuning"]["seed"]
        cells = [self.cell(arm, seed, {**chosen, **each}, "validation") for each in choices]
        means = [fmean(cell["right"].values()) for cell in cells]
        return choices[means.index(max(means))]

    def cell(self, arm: str, seed: int, settings: Mapping[str, Any], split: str) -> dict[str, Any]:
        """Return a cell, computed where it is missing."""
        named = {"arm": arm, "seed": seed, "split": split, "settings": dict(settings)}
        if (key := _key(named)) in self.cells:
            return self.cells[key]
        case, wall = Case(self, seed, settings, split), time.monotonic()
        made = ARMS[arm](case)
        cell = named | {"order": case.order, "right": self._right(case, made.models)}
        if split == "test":
            learned = {
                task: self._right(case, Models({"": end}), task)[task]
                for task, end in made.ends.items()
            }
            if made.of_stages:
                learned = self.cell("alone", seed, {}, split)["right"]
            cell |= {"learned": learned, "most": {t: most(r) for t, r in case.scored.items()}}
            if arm != "alone":
                cell |= {"general": general(self.scored, made.models)}
        cell |= {
            "rank": made.rank,
            "adapters": made.adapters,
            "steps": made.steps,
            "old_rows": made.old_rows,
            "cpu_seconds": round(made.cpu, 1),
            "wall_seconds": round(time.monotonic() - wall),
            "machine": machine(),
        }
        self.cells[key] = cell
        with self.results.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(f"{fmean(cell['right'].values()):.3f} {key}", flush=True)
        return cell

    def _right(self, case: Case, models: Models, task: str = "") -> dict[str, float]:
        rows = {task: case.scored[task]} if task else case.scored
        return right_by_task(self.scored, models, rows)


def beyond(key: str, values: Sequence[float], best: float) -> list[float]:
    """Return a value beyond the edge of a grid where the best one is there, once."""
    factor = FACTORS.get(key, 10)
    low, high = min(values), max(values)
    if not factor or low < best < high or len(values) < 2:
        return []
    found = float(
        f"{best / factor if best == low else best * factor:.0e}"
        if key == "rate"
        else best / factor
        if best == low
        else best * factor
    )
    return [] if key == "replay" and found > 1 else [found]


def most(rows: Sequence[Example]) -> float:
    """Return the share of the most frequent answer."""
    answers = [row.references[0] for row in rows]
    return max(map(answers.count, answers)) / len(answers)


def machine() -> dict[str, Any]:
    """Return what numbers may depend on."""
    git = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False)
    return {"revision": found.stdout.strip(), **versions(), **hardware(torch.device("cpu"))}


def _key(cell: Mapping[str, Any]) -> str:
    names = ("arm", "seed", "split", "settings")
    return json.dumps({name: cell[name] for name in names}, sort_keys=True)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load(options.plan.read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    for compute in Runner(plan, options.data, options.output.resolve()).all():
        compute()


if __name__ == "__main__":
    main()
