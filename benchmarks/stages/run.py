"""Five data sets, one after the other or beside each other: what is kept, and what it costs.

    python benchmarks/stages/run.py --data path/to/data/sets --output runs/stages
    python benchmarks/stages/run.py … --only primary

README.md says what is compared, plan.yaml holds every choice. A cell, an arm with a seed and a
prompt, is one line of OUTPUT/results.jsonl. Kill it and start it again at will: links, scores and
cells that are there are not computed again. `links.py` trains, combines and scores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from links import Lab, State

from chainlora.data.examples import Example

HERE = Path(__file__).parent
QUESTIONS = {
    "agnews": "Which topic is it?",
    "dbpedia": "What kind of thing is it?",
    "subj": "Is it an opinion or a fact?",
    "times": "What is it in 24 hours?",
    "trec": "What is asked for?",
}
Rows = list[Example]
Ends = dict[str, State]  # the state right after a task was learned, by task


# --- rows: pure functions of the seed ---


def read_pool(data: Path, task: str, letters: int) -> tuple[list[Any], list[Any]]:
    """Return texts and labels for training and for tests, no text twice or in both."""
    if task == "times":
        found = [_time(hour, minute) for hour in range(24) for minute in range(60)]
        random.Random(1).shuffle(found)
        return found[:1000], found[1000:]
    pools: list[dict[str, str]] = []
    for split in ("train", "test"):
        lines = (data / task / f"{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        rows = [json.loads(line) for line in lines]
        pools.append({row["text"].strip()[:letters]: row["label"] for row in rows})
    train, test = pools
    return [*train.items()], [pair for pair in test.items() if pair[0] not in train]


def _time(hour: int, minute: int) -> tuple[str, str]:
    text = f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
    return text, f"{hour:02}:{minute:02}"


def dealt(rows: Sequence[Any], count: int, key: str) -> list[Any]:
    """Return `count` rows: all of them in a random order before one comes again."""
    found: list[Any] = []
    while len(found) < count:
        found += random.Random(f"{key} {len(found)}").sample(rows, len(rows))
    return found[:count]


def balanced(groups: Sequence[Sequence[Any]], count: int, key: str) -> list[Any]:
    """Return `count` rows, one of each group in turn."""
    each = -(-count // len(groups))
    columns = [dealt(rows, each, f"{key} {place}") for place, rows in enumerate(groups)]
    return [row for turn in zip(*columns, strict=True) for row in turn][:count]


def mixed(rows: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return all rows in their order, the others spread evenly between them."""
    placed = [
        ((place + 0.5) / len(part), kind, row)
        for kind, part in enumerate((rows, others))
        for place, row in enumerate(part)
    ]
    return [row for *_, row in sorted(placed, key=lambda each: each[:2])]


# --- one seed with one prompt and one choice of rates ---


@dataclass
class Case:
    """The rows, the order and the settings of a cell, and the steps that arms are made of."""

    lab: Lab
    plan: Mapping[str, Any]
    pools: Mapping[str, Any]
    seed: int
    prompt: str
    settings: Mapping[str, Any]
    old_rows: int = 0  # rows of finished stages that were read again to train, or for Grams
    spent: list[dict[str, float]] = field(default_factory=list)

    @cached_property
    def order(self) -> list[str]:
        """The tasks in the order of this seed."""
        return random.Random(f"{self.seed} order").sample(
            self.plan["tasks"], len(self.plan["tasks"])
        )

    @cached_property
    def rows(self) -> dict[str, dict[str, Rows]]:
        """Training, validation, test and kept rows of each task, drawn for the seed."""
        found, counts = {}, self.plan["rows"]
        for task, (pool, tests) in self.pools.items():
            question = {"own": QUESTIONS[task], "shared": "Answer:"}[self.prompt]
            mine = random.Random(f"{self.seed} {task} rows").sample(pool, len(pool))
            parts = {
                "train": mine[: counts["train"]],
                "validation": mine[counts["train"] :][: counts["validation"]],
                "test": random.Random(f"{self.seed} {task} test").sample(tests, counts["test"]),
            }
            sets = {name: self.lab.encode(part, question) for name, part in parts.items()}
            count, train = self.settings["kept"], sets["train"]
            drawn = random.Random(f"{self.seed} {task} kept")
            sets["kept"] = train if count == "all" else drawn.sample(train, count)
            found[task] = sets
        return found

    def new_rows(self, task: str) -> Rows:
        """Return what a stage reads of its own task, in order."""
        train = self.rows[task]["train"]
        return dealt(train, self.settings["epochs"] * len(train), f"{self.seed} {task} train")

    def kept(self, tasks: Sequence[str], count: int, key: str) -> Rows:
        """Return kept rows of tasks to read again, balanced."""
        self.old_rows += count
        return balanced([self.rows[t]["kept"] for t in tasks], count, f"{self.seed} {key}")

    @property
    def num_again(self) -> int:
        """Rows that a rehearsal reads."""
        return int(self.settings["rehearsal"] * self.plan["batch"])

    def train(self, state: State, rows: Rows, rate: str, name: str, **more: Any) -> State:
        """Add a link to a state (or go on with its last one), trained on rows in their order."""
        shared = self.settings["init"] == "shared" and name in self.order
        draw = "all" if shared else name
        rate = self.settings[rate] * self.settings["factor"]
        state, info = self.lab.train(state, rows, rate, seed=self.seed, draw=draw, **more)
        self.spent.append(info)
        return state

    def replayed(self, place: int) -> Rows:
        """Return the rows of a stage that reads its share of old ones on the way.

        Over all stages these are as many old rows, and steps, as a rehearsal has.
        """
        task, before = self.order[place], self.order[:place]
        new = self.new_rows(task)
        if not before:
            return new
        share = self.num_again // (len(self.order) - 1)
        return mixed(new, self.kept(before, share, f"{task} replay"))

    def derive(self, kind: str, states: Sequence[State], **more: Any) -> State:
        """Return states merged without training."""
        state, info = self.lab.derive(kind, sorted(states), **more)
        self.spent.append(info)
        return state

    def right(self, state: State, split: str) -> dict[str, float]:
        """Return how often each task is answered right."""
        return {task: self.lab.right(state, self.rows[task][split]) for task in self.order}


# --- the arms ---


def on_top(case: Case, *, replay: bool = False, rank: int = 0) -> tuple[State, Ends]:
    """A fresh link for each task on those before; with a rank, one LoRA that goes on."""
    state, ends = (), {}
    for place, task in enumerate(case.order):
        rows = case.replayed(place) if replay else case.new_rows(task)
        more = {"rank": rank, "goes_on": place > 0} if rank else {}
        state = ends[task] = case.train(state, rows, "rate", task, **more)
    return state, ends


def beside(case: Case, kind: str, *, passes: int = 1) -> tuple[State, Ends]:
    """A link for each task from the base, put together without training."""
    ends = {task: case.train((), case.new_rows(task), "rate", task) for task in case.order}
    more: dict[str, Any] = {}
    if kind == "combined":
        kept = {ends[task]: case.rows[task]["kept"] for task in case.order}
        if passes > 1:  # as many as the package reads
            kept = {end: rows[:: -(-len(rows) // 64)] for end, rows in kept.items()}
        case.old_rows += sum(map(len, kept.values()))
        more = {"kept": kept, "ridge": case.plan["ridge"][passes - 1], "passes": passes}
    state = case.derive(kind, [*ends.values()], **more)
    return state, ends


def scaled(case: Case, before: tuple[State, Ends]) -> tuple[State, Ends]:
    """What was put together, weaker or stronger."""
    return case.derive("scaled", [before[0]], scale=case.settings["scale"]), before[1]


def rehearsed(case: Case, before: tuple[State, Ends], *, rank: int = 0) -> tuple[State, Ends]:
    """A short stage on kept rows of all tasks, balanced, on top of what is there."""
    state, ends = before
    rows = case.kept(sorted(case.order), case.num_again, "rehearsal")
    more = {"rank": rank, "goes_on": True} if rank else {}
    return case.train(state, rows, "again", "rehearsal", **more), ends


def at_once(case: Case, *, kept: bool = False) -> tuple[State, Ends]:
    """One LoRA of rank Σr on all tasks, for as many rows and steps as stages and rehearsal have."""
    again = case.kept(sorted(case.order), case.num_again, "rehearsal")
    new = [row for task in sorted(case.order) for row in case.new_rows(task)]
    rows = dealt(new + again, len(new + again), f"{case.seed} at once")
    if kept:
        rows = case.kept(sorted(case.order), len(rows), "kept only")
        case.old_rows = len(rows)
    return case.train((), rows, "rate", "at once", rank=_wide(case)), {}


def _wide(case: Case) -> int:
    return int(case.plan["rank"] * len(case.order))


def _narrow(case: Case) -> int:
    return int(case.plan["rank"])


RATE, BOTH = ("rate",), ("rate", "again")
Arm = tuple[tuple[str, ...], Callable[[Case], tuple[State, Ends]]]
ARMS: dict[str, Arm] = {  # what of its grid an arm chooses, and what it does
    "on top": (RATE, on_top),
    "on top rehearsed": (BOTH, lambda c: rehearsed(c, on_top(c))),
    "replay": (RATE, lambda c: on_top(c, replay=True)),
    "combined": (RATE, lambda c: beside(c, "combined")),
    "combined rehearsed": (BOTH, lambda c: rehearsed(c, beside(c, "combined"))),
    "combined twice": (RATE, lambda c: beside(c, "combined", passes=2)),
    "combined twice rehearsed": (BOTH, lambda c: rehearsed(c, beside(c, "combined", passes=2))),
    "summed": (RATE, lambda c: beside(c, "summed")),
    "summed rehearsed": (BOTH, lambda c: rehearsed(c, beside(c, "summed"))),
    "scaled": (("rate", "scale"), lambda c: scaled(c, beside(c, "summed"))),
    "ties": (("rate", "scale"), lambda c: scaled(c, beside(c, "ties"))),
    "base rehearsed": (("again",), lambda c: rehearsed(c, ((), {}))),
    "one LoRA": (RATE, lambda c: on_top(c, rank=_narrow(c))),
    "one LoRA replay": (RATE, lambda c: on_top(c, rank=_narrow(c), replay=True)),
    "one LoRA rehearsed": (
        BOTH,
        lambda c: rehearsed(c, on_top(c, rank=_narrow(c)), rank=_narrow(c)),
    ),
    "one wide LoRA": (RATE, lambda c: on_top(c, rank=_wide(c))),
    "one wide LoRA replay": (RATE, lambda c: on_top(c, rank=_wide(c), replay=True)),
    "one wide LoRA rehearsed": (
        BOTH,
        lambda c: rehearsed(c, on_top(c, rank=_wide(c)), rank=_wide(c)),
    ),
    "all at once": (RATE, at_once),
    "all at once on kept rows": (RATE, lambda c: at_once(c, kept=True)),
}


# --- cells, in the order of the plan ---


class Runner:
    """The cells that are there, and the means to compute the others."""

    def __init__(self, plan: Mapping[str, Any], data: Path, output: Path) -> None:
        self.plan, self.results = plan, output / "results.jsonl"
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        self.cells: dict[str, dict[str, Any]] = {}
        for cell in map(json.loads, lines):
            self.cells[_key(cell)] = cell
        self.pools = {task: read_pool(data, task, plan["letters"]) for task in plan["tasks"]}
        self.lab = Lab(output, plan)

    def gate(self) -> None:
        """Each task alone: is it learned, beyond the answer that most rows have?"""
        gate = self.plan["gate"]
        settings = self.plan["defaults"] | {"rate": gate["rate"]}
        for task in self.plan["tasks"]:
            case = self._case(gate["seed"], gate["prompt"], settings)
            rows = case.rows[task]["validation"]
            answers = [row.references[0] for row in rows]
            most = max(map(answers.count, answers)) / len(answers)
            state = case.train((), case.new_rows(task), "rate", task)
            right = {task: self.lab.right(state, rows)}
            self._note(case, f"alone {task}", "validation", right, majority=most)

    def study(self, study: Mapping[str, Any]) -> None:
        """Choose the settings of each arm on the tuning seed, then run the study's seeds."""
        changed = self.plan["defaults"] | study.get("change", {})
        chosen = {arm: self.choose(arm) for arm in study["arms"]}
        for seed in study["seeds"]:
            for arm in study["arms"]:
                self.cell(arm, seed, study["prompt"], changed | chosen[arm], "test")

    def choose(self, arm: str) -> dict[str, Any]:
        """Return the settings of most right validation answers, the first of equal ones.

        With the shared prompt and the plan's defaults, whatever the study. A rate at an edge of its
        grid adds one value beyond it, once.
        """
        grid = {key: [*self.plan["grids"][key]] for key in ARMS[arm][0]}
        best = self._best(arm, grid)
        for key in grid.keys() - {"scale"}:
            if best[key] == grid[key][0]:
                grid[key].insert(0, float(f"{grid[key][0] / 3:.0e}"))
            elif best[key] == grid[key][-1]:
                grid[key].append(float(f"{grid[key][-1] * 3:.0e}"))
        return self._best(arm, grid)

    def _best(self, arm: str, grid: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        choices = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        seed, common = self.plan["tuning_seed"], self.plan["defaults"]
        found = [self.cell(arm, seed, "shared", common | each, "validation") for each in choices]
        means = [fmean(cell["right"].values()) for cell in found]
        return choices[means.index(max(means))]

    def cell(
        self, arm: str, seed: int, prompt: str, settings: Mapping[str, Any], split: str
    ) -> dict[str, Any]:
        """Return a cell, computed where it is missing."""
        case = self._case(seed, prompt, settings)
        named = {"arm": arm, "seed": seed, "prompt": prompt, "split": split}
        key = _key(named | {"settings": dict(settings)})
        if key in self.cells:
            return self.cells[key]
        state, ends = ARMS[arm][1](case)
        learned = (
            {}
            if split == "validation"
            else {task: self.lab.right(end, case.rows[task][split]) for task, end in ends.items()}
        )
        return self._note(case, arm, split, case.right(state, split), learned=learned)

    def _case(self, seed: int, prompt: str, settings: Mapping[str, Any]) -> Case:
        return Case(self.lab, self.plan, self.pools, seed, prompt, dict(settings))

    def _note(
        self, case: Case, arm: str, split: str, right: Mapping[str, float], **more: Any
    ) -> dict[str, Any]:
        cell = {
            "arm": arm,
            "seed": case.seed,
            "prompt": case.prompt,
            "split": split,
            "settings": case.settings,
            "order": case.order,
            "right": right,
            **more,
            "steps": sum(int(each["steps"]) for each in case.spent),
            "old_rows": case.old_rows,
            "cpu_seconds": round(sum(each["cpu_seconds"] for each in case.spent), 1),
            "seconds": round(sum(each["seconds"] for each in case.spent), 1),
            "machine": self.lab.machine,
        }
        key = _key(cell)
        if key not in self.cells:
            self.cells[key] = cell
            with self.results.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            print(f"{fmean(right.values()):.3f}", key, flush=True)
        return cell


def _key(cell: Mapping[str, Any]) -> str:
    names = ("arm", "seed", "prompt", "split", "settings")
    return json.dumps({name: cell[name] for name in names}, sort_keys=True)


def main() -> None:
    """Run what is missing of the gate and the studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument(
        "--only", help="gate, or the name of a study; tune:STUDY chooses rates only"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    runner = Runner(yaml.safe_load(options.plan.read_text()), options.data, options.output)
    only = options.only
    if only in (None, "gate"):
        runner.gate()
    for study in runner.plan["studies"]:
        if only == f"tune:{study['name']}":
            print({arm: runner.choose(arm) for arm in study["arms"]})
        elif only in (None, study["name"]):
            runner.study(study)


if __name__ == "__main__":
    main()
