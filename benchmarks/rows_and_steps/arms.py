"""Arms: what is made of the stages of a seed, by settings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import rows
import torch
from combining import Combination, tokens_of
from featcal import featcal
from model import Models, Scored
from router import nearest
from torch import Tensor
from torch.nn import functional
from training import Runs, named

from chainlora import Link
from chainlora.data.rows import MemoryRows
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState


@dataclass
class Made:
    """Models of an arm, and what they cost."""

    models: Models
    rank: int | None  # exported; None: as wide as the modules
    seconds: float  # of the processor, with the stages, without scoring
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """Rows and stages of a seed, in its order."""

    plan: Mapping[str, Any]
    data: Path
    work: Path
    scored: Scored
    seed: int
    tasks: Sequence[str]
    kept: int
    settings: Mapping[str, Any]

    @property
    def order(self) -> list[str]:
        return random.Random(f"{self.seed} order").sample(sorted(self.tasks), len(self.tasks))

    @cached_property
    def rows(self) -> dict[str, dict[str, rows.Rows]]:
        counts = self.plan["rows"]
        return {task: rows.draw(self.data, task, self.seed, counts) for task in self.order}

    @cached_property
    def train(self) -> dict[str, rows.Rows]:
        return {task: of_task["train"] for task, of_task in self.rows.items()}

    @cached_property
    def runs(self) -> Runs:
        return Runs(self.work, self.plan, self.scored)

    @cached_property
    def stages(self) -> dict[str, OpenState]:
        keys = self.train, self.seed, self.plan["kept"], self.settings.get("times", 1)
        return {task: self.runs.alone(task, *keys) for task in self.order}

    @cached_property
    def links(self) -> dict[str, Sequence[Link]]:
        return {task: state.links() for task, state in self.stages.items()}

    @property
    def stage_seconds(self) -> float:
        """Seconds of the stages, each on its own."""
        costs = (self.runs.costs(state.run.name) for state in self.stages.values())
        return sum(sum(of_run.values()) for of_run in costs)

    @cached_property
    def kept_rows(self) -> dict[str, MemoryRows]:
        """Kept rows by task: the first of those with the smallest hashes, as the product keeps."""
        found = {task: state.kept()[named(task)].train for task, state in self.stages.items()}
        return {task: MemoryRows(some[: self.kept]) for task, some in found.items()}

    def combination(self, *, with_base: bool = True) -> Combination:
        base = OpenBase(self.plan["model"], self.plan["train"]["dtype"])
        return Combination(
            self.work / "combined",
            base.chain,
            self.links,
            self.kept_rows,
            self.runs.general.train if with_base else MemoryRows(),
            [self.plan["model"], self.seed, self.kept, with_base, sorted(self.tasks)],
        )


# --- arms ---


def base(case: Case) -> Made:
    """The base as it is."""
    return Made(Models({"": []}), 0, 0.0)


def alone(case: Case) -> Made:
    """Each stage's own model on its own rows: an oracle as router."""
    models = Models(dict(case.links), lambda task, prompts: [task] * len(prompts))
    return Made(models, case.plan["rank"], case.stage_seconds)


def ours(case: Case, *, with_base: bool = True) -> Made:
    """The closed form, and steps of its link."""
    both, s = case.combination(with_base=with_base), case.settings
    point, closed = both.closed(s)
    keys = [("closed", {k: v for k, v in s.items() if k not in ("steps", "rate", "weight")})]
    point, stepped = both.stepped(point, keys, s, case.seed)
    more = {"closed_seconds": closed, "step_seconds": stepped}
    seconds = case.stage_seconds + closed + stepped
    return Made(Models({"": [point.link()]}), both.rank, seconds, more)


def without_closed_form(case: Case) -> Made:
    """The same steps from the base, or from the mean of the updates."""
    both, s = case.combination(), case.settings
    start = both.from_base() if s["begin"] == "base" else both.from_mean()
    point, stepped = both.stepped(start, [s["begin"]], s, case.seed)
    seconds = case.stage_seconds + stepped
    return Made(Models({"": [point.link()]}), both.rank, seconds, {"step_seconds": stepped})


def calibrated(case: Case) -> Made:
    """FeatCal."""
    began, s = time.process_time(), {**case.settings}
    read = s.pop("read")
    kept = {task: tokens_of(some, read) for task, some in sorted(case.kept_rows.items())}
    case.scored.put({})
    update = featcal(case.scored.model, case.links, kept, **s)
    seconds = case.stage_seconds + time.process_time() - began
    return Made(Models({"": update}), None, seconds)


def replay(case: Case) -> Made:
    """Stages on top of each other that read old rows."""
    s = case.settings
    state = case.runs.replay(case.train, case.seed, case.kept, s)
    made, size = _of_run(case, state), case.plan["train"]["batch_size"]
    links = state.links()
    readers = links if s["general"] != "none" else links[1:]
    old = sum(int(link.num_steps * size * s["replay"] + 1e-9) for link in readers)
    made.more["old_rows"] = old  # of the base too
    return made


def at_once(case: Case) -> Made:
    """One LoRA on the rows of all stages, mixed."""
    return _of_run(case, case.runs.at_once(case.train, case.seed, case.settings))


def _of_run(case: Case, state: OpenState) -> Made:
    links, seconds = state.links(), sum(case.runs.costs(state.run.name).values())
    rank = sum(link.rank for link in links)
    return Made(Models({"": links}), rank, seconds, {"steps": sum(x.num_steps for x in links)})


def routed(case: Case, make: Callable[..., Any]) -> Made:
    """Each stage's own model behind a router that reads hidden states of the base."""
    began, scored = time.process_time(), case.scored

    def features(prompts: Sequence[Sequence[int]]) -> Tensor:
        scored.put({})
        return scored.means(prompts, case.settings["layer"])

    prompts = {task: [row.prompt for row in some[:]] for task, some in case.kept_rows.items()}
    route = make(features, prompts, case.settings)
    seconds = case.stage_seconds + time.process_time() - began
    count = {"adapters": len(case.order)}
    return Made(Models(dict(case.links), route), case.plan["rank"], seconds, count)


def centroid(features: Any, prompts: Any, s: Mapping[str, Any]) -> Any:
    """A prompt goes to the task of the nearest centroid."""
    return nearest(features, prompts)


def ridge(features: Any, prompts: Mapping[str, Any], s: Mapping[str, Any]) -> Any:
    """A prompt goes to the task of the largest output of a ridge regression on random ReLU
    features, solved once."""
    names = [*prompts]
    x = torch.cat([features(prompts[name]) for name in names])
    mean, scale = x.mean(0), x.std(0) + 1e-6
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(x.shape[1], s["features"], generator=generator) / x.shape[1] ** 0.5

    def seen(x: Tensor) -> Tensor:
        return functional.relu(((x - mean) / scale) @ drawn).double()

    labels = torch.tensor([place for place, name in enumerate(names) for _ in prompts[name]])
    wanted = functional.one_hot(labels, len(names)).double()
    h = seen(x)
    gram = h.T @ h + s["ridge"] * torch.eye(h.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, h.T @ wanted)

    def route(task: str, some: Sequence[Sequence[int]]) -> list[str]:
        chosen = (seen(features(some)) @ weights).argmax(1).tolist() if some else []
        return [names[place] for place in chosen]

    return route


ARMS: dict[str, Callable[[Case], Made]] = {
    "base": base,
    "alone": alone,
    "ours": ours,
    "replay": replay,
    "all at once": at_once,
    "ours without the base": partial(ours, with_base=False),
    "ours without the closed form": without_closed_form,
    "FeatCal": calibrated,
    "centroid router": partial(routed, make=centroid),
    "ridge router": partial(routed, make=ridge),
}
