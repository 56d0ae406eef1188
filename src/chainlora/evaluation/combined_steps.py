"""Train the link of a combination for a few steps on kept rows (`How.steps`).

The closed form (`chain.solving`) is the start; its rank stays. A step reads `ROWS` rows of the
parts in turn, and `GENERAL_ROWS` general rows, on which the base is the teacher. Its loss is

    mean of −log p(answer token)  +  `WEIGHT` · mean of KL(base ‖ model) at the general rows' tokens

Rows and their order depend on the parts alone, so equal parts give equal bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from chainlora import files
from chainlora.chain.chain import Chain
from chainlora.chain.combining import Combined
from chainlora.chain.initialization import generator_for
from chainlora.chain.link import Factors, Link
from chainlora.config.schema import LinkConfig
from chainlora.data.examples import Example
from chainlora.data.rows import Rows
from chainlora.engine.engine import Engine
from chainlora.engine.head import divergence
from chainlora.errors import DivergedError

ROWS, GENERAL_ROWS = 12, 4  # of a step
RATE, WARMUP = 3e-4, 0.1  # the largest rate, and the share of the steps before it
WEIGHT = 4.0  # of the divergence from the base
MOST_NORM = 1.0  # of the gradient
POINT = "combined.safetensors"
_TOKENS = 4096  # of rows that are computed together
_SAVE_EVERY = 10  # steps


@dataclass(frozen=True)
class Lessons:
    """The rows of each part and of the base, and how often they are read."""

    rows: Sequence[Rows]  # of each part, at least one row
    general: Rows  # perhaps none
    steps: int
    seed: int
    peak: float = RATE
    weight: float = WEIGHT

    def batch(self, step: int) -> tuple[list[Example], list[Example]]:
        """Return the rows and the general rows of a step."""
        rows = [row.right for row in self._drawn(self.rows, step * ROWS, ROWS)]
        general = [self.general] if len(self.general) else []
        return rows, [*self._drawn(general, step * GENERAL_ROWS, GENERAL_ROWS)]

    def _drawn(self, pools: Sequence[Rows], first: int, count: int) -> Iterator[Example]:
        """Yield rows of the pools in turn; each pool is read in a new order in each epoch."""
        for draw in range(first, first + count) if pools else ():
            turn, pool = divmod(draw, len(pools))
            epoch, place = divmod(turn, len(pools[pool]))
            generator = generator_for(self.seed, pool, f"{epoch}")
            order = torch.randperm(len(pools[pool]), generator=generator)
            yield pools[pool][int(order[place])]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear from 0 up, then linear down to 0."""
        warmup = max(1.0, WARMUP * self.steps)
        down = (self.steps - step) / max(1.0, self.steps - warmup)
        return self.peak * min((step + 1) / warmup, down, 1.0)


@dataclass(frozen=True)
class Point:
    """A link on its way: the factors ``A/MODULE`` and ``B/MODULE``, and the optimizer's state."""

    step: int
    tensors: Mapping[str, Tensor]
    error: float  # of the rank, and distances from the parts: of the closed form
    distances: Mapping[str, float]

    @staticmethod
    def of(solved: Combined) -> Point:
        """Return the closed form as the first point."""
        factors = solved.factors.items()
        tensors = {f"A/{n}": f.a for n, f in factors} | {f"B/{n}": f.b for n, f in factors}
        return Point(0, tensors, solved.error, solved.distances)

    def write(self, path: Path, identity: str) -> None:
        """Save the point of a combination with this identity."""
        facts = {"identity": identity, "step": self.step}
        facts |= {"error": self.error, "distances": dict(self.distances)}
        files.make_folder(path.parent)
        files.write_tensors(path, self.tensors, {"point": json.dumps(facts)})

    @staticmethod
    def read(path: Path, identity: str) -> Point | None:
        """Return the saved point of a combination, None without a whole one."""
        with suppress(OSError, SafetensorError, ValueError, LookupError, TypeError):
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["point"])
            if facts.pop("identity") == identity:
                return Point(tensors=load_file(path), **facts)
        return None

    def link(self) -> Link:
        """Return the point as a link."""
        names = [name.removeprefix("A/") for name in self.tensors if name.startswith("A/")]
        factors = {n: Factors(self.tensors[f"A/{n}"], self.tensors[f"B/{n}"]) for n in names}
        rank = max(each.a.shape[0] for each in factors.values())
        config = LinkConfig(rank=rank, alpha=float(rank))
        return Link(0, config, factors, num_steps=self.step, error=self.error)


def trained(
    chain: Chain,
    start: Sequence[Link],
    point: Point,
    lessons: Lessons,
    save: Callable[[Point], None],
    report: Callable[[int, int], None],
) -> Point:
    """Return the last point of a link; `start` are the links of the teacher, mostly none."""
    with Engine(chain.model, training=True) as engine:
        chain.add(*start)
        known = {row: _hidden_states(engine, row) for row in lessons.general}
        chain.drop(len(start))
        link = point.link()
        names = tuple(link.factors)
        adapter = chain.extend(link.config.model_copy(update={"target_modules": names}))
        engine.adapt(adapter.layers.values())
        factors = {k: v for k, v in point.tensors.items() if k[:2] in ("A/", "B/")}
        chain.load_live_state(factors, point.step)
        optimizer = torch.optim.AdamW(chain.parameters(), weight_decay=0.0)
        _load_moments(optimizer, point)
        for step in range(point.step, lessons.steps):
            report(step, lessons.steps)
            rows, general = lessons.batch(step)
            _add_gradients(engine, rows, general, [known[row] for row in general], lessons.weight)
            _update(optimizer, lessons.rate(step))
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == lessons.steps:
                tensors = chain.live_state() | _moments(optimizer)
                point = replace(point, step=step + 1, tensors=tensors)
                save(point)
        chain.discard()
    return point


def _hidden_states(engine: Engine, row: Example) -> Tensor:
    """Return the hidden states [tokens, width] that predict the learned tokens of a row."""
    with engine.plain():
        batch = engine.pack([row])
        hidden = engine.at_head(lambda model, states, batch: states[batch.token_row], batch)
    return hidden.clone()  # outside of inference mode: autograd takes it


def _add_gradients(
    engine: Engine,
    rows: Sequence[Example],
    general: Sequence[Example],
    known: Sequence[Tensor],
    weight: float,
) -> None:
    """Add the gradients of a step; rows are computed up to `_TOKENS` tokens at a time."""
    terms, batch = sum(row.num_learned for row in rows), list[Example]()
    for row, after in zip_longest(rows, rows[1:]):
        batch.append(row)
        longest = max(len(each.sequences[0]) for each in [*batch, after or row])
        if after is None or longest * (len(batch) + 1) > _TOKENS:
            (engine.loss(engine.pack(batch), "completion")[0] / terms).backward()
            batch = []
    if general:
        packed = engine.pack(general)
        apart = engine.at_head(partial(divergence, teacher=torch.cat([*known])), packed)
        (weight * apart / packed.num_scored_tokens).backward()


def _update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make a step at a rate. Raises DivergedError for a gradient that is not finite."""
    (group,) = optimizer.param_groups
    norm = nn.utils.clip_grad_norm_(group["params"], MOST_NORM)
    if not bool(norm.isfinite()):
        rule = "steps of a combination must have finite gradients"
        raise DivergedError(rule, f"a norm of {float(norm)}", "combine with fewer steps, or none")
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of AdamW as tensors, ``KEY/PLACE``."""
    (group,) = optimizer.param_groups
    states = enumerate(optimizer.state[parameter] for parameter in group["params"])
    return {f"{key}/{place}": value for place, of in states for key, value in of.items()}


def _load_moments(optimizer: torch.optim.Optimizer, point: Point) -> None:
    (group,) = optimizer.param_groups
    for place, parameter in enumerate(group["params"]) if point.step else ():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: point.tensors[f"{key}/{place}"] for key in keys}
