"""Ours: the closed form and its steps, with settings that the product has no key for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from chainlora import Link
from chainlora.chain.chain import Chain
from chainlora.chain.combining import RIDGE, Equations, Part, Solved, Sums
from chainlora.chain.initialization import generator_for, random_factors
from chainlora.chain.link import Factors, stack_links
from chainlora.chain.solving import combine
from chainlora.config.schema import LinkConfig
from chainlora.data.rows import Rows
from chainlora.evaluation.combination import TOKENS
from chainlora.evaluation.combined_steps import Lessons, Point, trained

Settings = Mapping[str, Any]


@dataclass
class Tuned(Equations):
    """The product's equations with another ridge, target and anchor.

    The ridge is a multiple of the `mean` or of the `median` diagonal. The target is T_j, mixed with
    X̃_j ΔW_jᵀ at a share `alpha`. The ridge draws to ΔW_j, or to `anchor` · Σ ΔW_j if that is not 0.
    """

    ridge: float = RIDGE
    of: str = "mean"
    alpha: float = 0.0
    anchor: float = 0.0
    _drawn: list[tuple[Mapping[str, Factors], float]] = field(default_factory=list)

    def add(
        self, sums: Sums, num_tokens: int, updates: Mapping[str, Factors], importance: float = 1.0
    ) -> None:
        assert sums.gram is not None
        if self.alpha and sums.shift is not None:  # of T_j = (W_0 + ΔW_j)(X_j − X̃_j) + ΔW_j X̃_j
            sums.shift.mul_(1 - self.alpha)
        gram = sums.gram.tril() + sums.gram.tril(-1).T
        for name, cross in sums.cross.items() if self.alpha else ():
            cross.mul_(1 - self.alpha)
            if name in updates:
                product = _dense(updates[name]) @ gram.double()
                cross.add_(product.to(cross.dtype), alpha=self.alpha)
        diagonal = sums.gram.diagonal() * (importance / num_tokens)
        mean = RIDGE * float(diagonal.mean())
        own = self.ridge * float(getattr(diagonal, self.of)())
        super().add(sums, num_tokens, updates, importance)
        assert self._s is not None
        self._s.diagonal().add_(own - mean)
        for name, update in updates.items():
            self.add_product(name, (own - mean) * _dense(update))
        self._drawn.append((updates, own))

    def solve(self, rank: int) -> dict[str, Solved]:
        whole = sum(ridge for _, ridge in self._drawn)
        for updates, ridge in self._drawn if self.anchor else ():
            for name, update in updates.items():
                self.add_product(name, (self.anchor * whole - ridge) * _dense(update))
        return super().solve(rank)


def _dense(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


@dataclass
class Combination:
    """Links of stages and their kept rows, combined below a folder where the result is missing."""

    folder: Path
    chain: Callable[[], Chain]  # a new one on the base
    links: Mapping[str, Sequence[Link]]  # of each stage
    kept: Mapping[str, Rows]
    general: Rows  # none: without the base
    key: Sequence[Any]  # names the stages

    @property
    def rank(self) -> int:
        return sum(link.rank for links in self.links.values() for link in links)

    def closed(self, s: Settings) -> tuple[Point, float]:
        """Return the closed form as a point, and its processor seconds."""
        keys = ("read", "ridge", "of", "alpha", "anchor", "importance")
        some = {key: s[key] for key in keys if key in s}
        return self._made(["closed", some], lambda _, save: self._solved(some))

    def _solved(self, s: Settings) -> Point:
        parts = [
            Part(task, tokens_of(self.kept[task], s["read"]), stack_links(links))
            for task, links in sorted(self.links.items())
        ]
        if len(self.general):
            rows = tokens_of(self.general, s["read"])
            parts.append(Part("base", rows, {}, s.get("importance", 1.0)))
        keys = {key: s[key] for key in ("ridge", "of", "alpha", "anchor") if key in s}
        return Point.of(
            combine(self.chain().model, parts, self.rank, equations=lambda: Tuned(**keys))
        )

    def from_base(self) -> Point:
        """Return random A and zero B."""
        config = LinkConfig(rank=self.rank, alpha=float(self.rank))
        factors = {
            name: random_factors(config, f.a.shape[1], f.b.shape[0], generator_for(0, 0, name))
            for name, f in self._stacked().items()
        }
        return _as_point(factors)

    def from_mean(self) -> Point:
        """Return the mean of the updates."""
        count = len(self.links)
        return _as_point({name: Factors(f.a, f.b / count) for name, f in self._stacked().items()})

    def _stacked(self) -> dict[str, Factors]:
        return stack_links([link for _, links in sorted(self.links.items()) for link in links])

    def stepped(
        self, start: Point, begin: Sequence[Any], s: Settings, seed: int
    ) -> tuple[Point, float]:
        """Return a point after steps, and the processor seconds of these; `begin` names `start`."""
        if not s["steps"]:
            return start, 0.0
        some = {key: s[key] for key in ("steps", "rate", "weight") if key in s}
        lessons = Lessons(
            rows=[self.kept[task] for task in sorted(self.kept)],
            general=self.general,
            steps=s["steps"],
            seed=seed,
            peak=s["rate"],
            weight=s.get("weight", 0.0),
        )

        def train(last: Point | None, save: Callable[[Point], None]) -> Point:
            return trained(self.chain(), [], last or start, lessons, save, lambda *done: None)

        return self._made([*begin, some], train)

    def _made(
        self,
        key: Sequence[Any],
        make: Callable[[Point | None, Callable[[Point], None]], Point],
    ) -> tuple[Point, float]:
        """Return a point and its processor seconds; a killed one goes on from its last steps."""
        name = json.dumps([*self.key, *key], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
        costs = path.with_suffix(".json")
        spent = json.loads(costs.read_text()) if costs.exists() else {"seconds": 0.0}
        point = Point.read(path, name)
        if point is not None and spent.get("done"):
            return point, spent["seconds"]
        began, before = time.process_time(), spent["seconds"] if point else 0.0

        def save(last: Point, **more: Any) -> None:
            last.write(path, name)
            seconds = round(before + time.process_time() - began, 1)
            costs.write_text(json.dumps({"seconds": seconds} | more))

        point = make(point, save)
        factors = {k: v for k, v in point.tensors.items() if k[:2] in ("A/", "B/")}
        save(point := replace(point, tensors=factors), done=True)
        return point, json.loads(costs.read_text())["seconds"]


def _as_point(factors: Mapping[str, Factors]) -> Point:
    tensors = {f"A/{n}": f.a for n, f in factors.items()}
    return Point(0, tensors | {f"B/{n}": f.b for n, f in factors.items()}, 0.0, {})


def tokens_of(rows: Rows, most: int) -> list[list[int]]:
    """Return rows as the product reads them: up to so many, and up to its limit of tokens."""
    found: list[list[int]] = []
    for row in rows.spread(most):
        found.append([*row.right.sequences[0]])
        if len(found) > 1 and sum(map(len, found)) > TOKENS:
            return found[:-1]
    return found
