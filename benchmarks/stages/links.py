"""One model in memory: links trained, merged and scored, each kept by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import ties
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from chainlora import Chain, LinkConfig, load_model, load_task
from chainlora.chain.adapters import Factors
from chainlora.chain.combining import Combination, gram_matrices, modules_by_input
from chainlora.chain.link import Link, stack_links, with_a
from chainlora.chain.low_rank import randomized_svd
from chainlora.config.schema import TrainConfig
from chainlora.data.encoding import Options, make_row_encoder
from chainlora.data.examples import Example
from chainlora.data.sources import Row
from chainlora.engine.engine import Engine
from chainlora.training.objective_kinds.likelihood import LanguageModelling
from chainlora.training.optimizers import make_optimizer
from chainlora.training.step import rate_factor

HERE = Path(__file__).parent
State = tuple[str, ...]  # digests of links, in the order they are added to the base
Info = dict[str, float]


class Lab:
    """A model with a chain on it; `train` and `derive` return the state with what they made.

    A link is named by the digest of its recipe (start, rows in order, rate, rank, seed), so that
    what two arms share is trained once, and arms cannot share what is not equal.
    """

    def __init__(self, output: Path, plan: Mapping[str, Any]) -> None:
        self.plan, self.links = plan, output / "links"
        self.links.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = load_model(plan["model"], dtype=plan["dtype"])
        task = load_task(HERE / "cl.yaml")
        self._encode = make_row_encoder(task, self.tokenizer, Options(objective="completion"))
        self.objective = LanguageModelling("completion")
        self.chain = Chain(self.model)
        self.now: State | None = None  # what the model is
        self.engine = self._open()
        self._scores = output / "scores.jsonl"
        lines = self._scores.read_text().splitlines() if self._scores.exists() else []
        self.scores: dict[str, float] = dict(map(json.loads, lines))
        self.machine = _machine()

    def _open(self) -> Engine:
        adapter = self.chain.extend(LinkConfig(rank=self.plan["rank"], alpha=2.0))
        engine = Engine(self.model, training=True, threads=1)
        engine.adapt(adapter.layers.values())
        self.chain.discard()
        return engine

    def encode(self, pairs: Sequence[tuple[str, str]], question: str) -> list[Example]:
        """Return texts and labels as examples."""
        rows = [
            Row({"prompt": f"{text}\n{question}", "answer": label}, place, question)
            for place, (text, label) in enumerate(pairs)
        ]
        return self._encode(rows).examples

    # --- links ---

    def train(
        self,
        state: State,
        rows: Sequence[Example],
        rate: float,
        *,
        seed: int,
        draw: str,
        rank: int = 0,
        goes_on: bool = False,
    ) -> tuple[State, Info]:
        """Train a fresh link on a state, or its last one further, on rows as they come.

        The first A is drawn from (seed, draw, module). The rate rises, and falls to 0 at the end.
        """
        rank = rank or self.plan["rank"]
        recipe = {
            "start": state,
            "rows": _digest([row.content().hex() for row in rows]),
            "rate": rate,
            "rank": rank,
            "draw": f"{seed} {draw}",
            "goes_on": goes_on,
            "common": [self.plan[k] for k in ("model", "dtype", "batch", "warmup")],
        }

        def make() -> Link:
            kept = state[:-1] if goes_on else state
            self.put(kept)
            self.chain.next_id = 1000 + int(_digest([seed, draw])[:8], 16)
            config = LinkConfig(rank=rank, alpha=2.0 * rank)
            layers = self.chain.extend(config).layers
            self.engine.adapt(layers.values())
            if goes_on:
                factors = self.link(state[-1]).factors
                parts = {f"A/{name}": each.a for name, each in factors.items()}
                parts |= {f"B/{name}": each.b for name, each in factors.items()}
                self.chain.load_live_state(parts, 0)
            self._steps(rows, rate)
            link = self.chain.live_link()
            self.chain.discard()
            self.chain.next_id = 0
            return Link(0, config, dict(link.factors))

        name, info = self._made(recipe, make, len(rows) // self.plan["batch"])
        return (*(state[:-1] if goes_on else state), name), info

    def _steps(self, rows: Sequence[Example], rate: float) -> None:
        size = self.plan["batch"]
        assert len(rows) % size == 0, len(rows)
        num_steps = len(rows) // size
        config = TrainConfig(lr=rate, schedule="linear", warmup_steps=self.plan["warmup"])
        parameters = list(self.chain.parameters())
        assert self.chain.adapter is not None
        optimizer = make_optimizer(self.chain.adapter, config)
        self.model.train()
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(config, [num_steps], step) * group["ratio"]
            batch = self.objective.collate(self.engine, rows[step * size : (step + 1) * size])
            self.engine.add_gradients(
                [batch],
                parameters,
                loss=lambda each: self.objective.loss(self.engine, each),
                count=self.objective.count,
            )
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def derive(
        self,
        kind: str,
        states: Sequence[State],
        *,
        scale: float = 1.0,
        kept: Mapping[State, Sequence[Example]] | None = None,
        ridge: float = 0.0,
        passes: int = 1,
    ) -> tuple[State, Info]:
        """Put states of one link each together: summed, scaled, ties, or combined."""
        own = [self.link(digest) for (digest,) in states]
        recipe: dict[str, Any] = {"kind": kind, "of": states, "scale": scale, "ridge": ridge}
        if kept:
            recipe["rows"] = _digest([row.content().hex() for s in states for row in kept[s]])
            recipe |= {"passes": passes, "fewer": 4} if passes > 1 else {}

        def make() -> Link:
            if kept:
                return self._combined(own, [kept[state] for state in states], ridge, passes)
            if kind == "ties":
                return _ties(own, self.plan["rank"] * len(own))
            return as_link(stack_links([replace(link, id=-1, strength=scale) for link in own]))

        name, info = self._made(recipe, make, 0)
        return (name,), info

    def _combined(
        self, own: Sequence[Link], rows: Sequence[Sequence[Example]], ridge: float, passes: int
    ) -> Link:
        """Combine links as the package does, here with any ridge and number of passes.

        Each pass but the last reads a fourth of the rows.
        """
        found = None
        self.engine.close()
        try:
            row = torch.tensor([rows[0][0].sequences[0][:16]])
            self.put(())
            groups = [*modules_by_input(self.model, own[0].factors, row)]
            for num in range(passes):
                sums = {names[0]: (names, Combination(ridge)) for names in groups}
                for place, (link, examples) in enumerate(zip(own, rows, strict=True)):
                    self.put(())
                    self.chain.add(found or link)
                    self.now = None
                    some = examples if num == passes - 1 else examples[::4]
                    tokens = [torch.tensor([row.sequences[0][:-1]]) for row in some]
                    grams = gram_matrices(self.model, sums, tokens)
                    for first, (names, each) in sums.items():
                        each.add(grams[first], {(f"{place}", n): link.factors[n].a for n in names})
                solved: dict[str, dict[str, Tensor]] = {}
                for _, each in sums.values():
                    for (key, name), a in each.solve().items():
                        solved.setdefault(key, {})[name] = a
                parts = [with_a(link, solved[f"{place}"]) for place, link in enumerate(own)]
                found = as_link(stack_links([replace(part, id=-1) for part in parts]))
        finally:
            self.engine = self._open()
        assert found is not None
        return found

    def _made(self, recipe: Any, make: Callable[[], Link], steps: int) -> tuple[str, Info]:
        """Return the digest of a link, made and written where it is missing, and its cost."""
        name = _digest(recipe)
        path = self.links / f"{name}.safetensors"
        if not path.exists():
            wall, cpu = time.monotonic(), time.process_time()
            link = make()
            cost = {
                "steps": steps,
                "seconds": time.monotonic() - wall,
                "cpu_seconds": time.process_time() - cpu,
            }
            tensors = {f"A/{m}": each.a.contiguous() for m, each in link.factors.items()}
            tensors |= {f"B/{m}": each.b.contiguous() for m, each in link.factors.items()}
            about = {"recipe": recipe, "cost": cost, "alpha": link.config.alpha}
            partial = path.with_suffix(".part")
            save_file(tensors, partial, {key: json.dumps(value) for key, value in about.items()})
            os.replace(partial, path)
        with safe_open(path, "pt") as file:
            return name, json.loads(file.metadata()["cost"])

    @lru_cache(maxsize=24)  # noqa: B019 - there is one lab
    def link(self, name: str) -> Link:
        """Read a link."""
        with safe_open(self.links / f"{name}.safetensors", "pt") as file:
            alpha = json.loads(file.metadata()["alpha"])
            modules = [key[2:] for key in file.keys() if key.startswith("A/")]  # noqa: SIM118
            get = file.get_tensor
            factors = {m: Factors(get(f"A/{m}"), get(f"B/{m}")) for m in modules}
        rank = max(each.a.shape[0] for each in factors.values())
        return Link(0, LinkConfig(rank=rank, alpha=alpha), factors)

    # --- scores ---

    def put(self, state: State) -> None:
        """Make the model the base with the links of a state."""
        if state == self.now:
            return
        self.now = None
        self.chain.drop(len(self.chain))
        self.chain.next_id = 0
        if state:
            self.chain.add(*(replace(self.link(n), index=i, id=i) for i, n in enumerate(state)))
        self.now = state

    def right(self, state: State, rows: Sequence[Example]) -> float:
        """Return how often greedy generation writes the label, and then a line break.

        It does where every token of both is the most probable one after those before it, which
        one forward shows.
        """
        key = _digest([state, [row.content().hex() for row in rows]])
        if key not in self.scores:
            self.put(state)
            order = sorted(rows, key=lambda row: len(row.sequences[0]))
            found = [
                right
                for at in range(0, len(rows), 25)
                for right in self._answers(order[at : at + 25])
            ]
            self.scores[key] = sum(found) / len(found)
            with self._scores.open("a") as file:
                file.write(json.dumps([key, self.scores[key]]) + "\n")
        return self.scores[key]

    def _answers(self, rows: Sequence[Example]) -> list[bool]:
        with self.engine.plain():
            batch = self.engine.pack(rows)
            found = self.engine.at_head(_most_probable, batch)
        wrong = batch.token_sequence[found[batch.token_row] != batch.token_target]
        return [row not in set(wrong.tolist()) for row in range(len(rows))]


def _most_probable(model: Any, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
    return model.get_output_embeddings()(hidden).argmax(-1)


def _ties(links: Sequence[Link], rank: int) -> Link:
    """TIES (arXiv 2306.01708), a fifth of the entries kept, as a link of the rank of the sum."""
    factors = {}
    for name in links[0].factors:
        parts = [link.delta_weight(name) for link in links]
        merged = ties(parts, torch.ones(len(parts)), 0.2)
        u, s, v = randomized_svd(merged, rank + 8, 0)
        factors[name] = Factors((s[:rank] * v[:, :rank]).T.contiguous(), u[:, :rank].contiguous())
    return as_link(factors)


def as_link(factors: Mapping[str, Factors]) -> Link:
    """Return factors as a link of scaling 1."""
    rank = max(each.a.shape[0] for each in factors.values())
    return Link(0, LinkConfig(rank=rank, alpha=float(rank)), dict(factors))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def _machine() -> dict[str, Any]:
    """Return what numbers may depend on."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "peft")
    return {
        "revision": git.stdout.strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu": f"{len(names)} × {names[0]}",
        "threads": torch.get_num_threads(),
    }
