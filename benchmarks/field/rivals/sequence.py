"""Tasks trained one after the other where the package has no way to: one LoRA that goes on, with
or without EWC, and O-LoRA. Steps are those of the package's engine, at its settings.

The state after each task is a file, so that a run that was stopped goes on there.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chainlora import Chain, Link, LinkConfig
from chainlora.chain.link import Factors
from chainlora.config.schema import TrainConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.training.objectives import LanguageModelling
from chainlora.training.optimizers import make_optimizer
from chainlora.training.step import rate_factor
from rivals.penalties import Anchors, orthogonality


class InTurn:
    """Tasks trained in turn; `load` gives a model, once something is to be trained."""

    def __init__(
        self, load: Callable[[], Any], seed: int, rate: float, train: Mapping[str, Any]
    ) -> None:
        self._load, self.seed = load, seed
        keys = {key: train[key] for key in ("batch_size", "warmup_steps")}
        self.config = TrainConfig(lr=rate, schedule="linear", **keys)
        self.shape = LinkConfig(rank=8, alpha=16.0)
        self.objective = LanguageModelling("completion")
        self.orthogonal = self.penalty = 0.0
        self.anchors = Anchors()
        self.seconds = 0.0  # of the processor, in all

    @cached_property
    def model(self) -> Any:
        return self._load()

    @cached_property
    def chain(self) -> Chain:
        return Chain(self.model, seed=self.seed)

    def run(
        self,
        rows: Mapping[str, Sequence[Example]],
        folder: Path,
        *,
        orthogonal: float = 0.0,
        penalty: float = 0.0,
        kept: Mapping[str, Sequence[Example]] | None = None,
    ) -> dict[str, list[Link]]:
        """Return the links after each task: with `orthogonal` one more for each, else one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.orthogonal, self.penalty = orthogonal, penalty
        found: dict[str, list[Link]] = {}
        for task, own in rows.items():
            path = folder / f"{task}.safetensors"
            before = [*found.values()][-1] if found else []
            if not path.exists():
                self._train(task, own, before, path, (kept or {}).get(task, ()))
            link = self._read(path)
            found[task] = [*before, link] if orthogonal else [link]
        return found

    def _train(
        self,
        task: str,
        rows: Sequence[Example],
        before: Sequence[Link],
        path: Path,
        kept: Sequence[Example],
    ) -> None:
        began, chain = time.process_time(), self.chain
        chain.drop(len(chain))
        if self.orthogonal:
            chain.add(*before)
        chain.begin_stage(task)
        adapter = chain.extend(self.shape)
        if before and not self.orthogonal:
            chain.load_live_state(_parts(before[-1]), 0)
        with Engine(self.model, training=True, threads=1) as engine:
            engine.adapt(adapter.layers.values())
            self._steps(engine, rows, task)
            more = self._noted(engine, kept) if self.penalty else {}
        tensors = _parts(chain.live_link()) | more
        chain.discard()
        tensors["seconds"] = torch.tensor(time.process_time() - began)
        partial = path.with_suffix(".part")
        save_file(tensors, partial)
        os.replace(partial, path)
        print(f"  {path.parent.name} {task}: {float(tensors['seconds']):.0f} s", flush=True)

    def _read(self, path: Path) -> Link:
        tensors = load_file(path)
        self.seconds += float(tensors["seconds"])
        names = [key[2:] for key in tensors if key.startswith("A/")]
        if self.penalty:
            count = sum(key.startswith("F/") for key in tensors)
            sums = ([tensors[f"{kind}/{n}"] for n in range(count)] for kind in "FW")
            self.anchors = Anchors(*sums)
        factors = {n: Factors(tensors[f"A/{n}"], tensors[f"B/{n}"]) for n in names}
        return Link(0, self.shape, factors)

    # --- steps ---

    def _steps(self, engine: Engine, rows: Sequence[Example], task: str) -> None:
        size, adapter = self.config.batch_size, self.chain.adapter
        order = random.Random(f"{self.seed} {task} order").sample(rows, len(rows))
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        assert adapter is not None
        optimizer, parameters = make_optimizer(adapter, self.config), [*self.chain.parameters()]
        self.model.train()
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                factor = rate_factor(self.config, [len(batches)], step)
                group["lr"] = self.config.lr * factor * group["ratio"]
            self._gradients(engine, batch, parameters)
            self._penalize(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.eval()

    def _gradients(
        self, engine: Engine, rows: Sequence[Example], parameters: Sequence[Any]
    ) -> None:
        engine.add_gradients(
            [self.objective.collate(engine, rows)],
            parameters,
            loss=lambda each: self.objective.loss(engine, each),
            count=self.objective.count,
        )

    def _penalize(self, parameters: Sequence[Any]) -> None:
        if self.penalty and self.anchors.fisher:
            for p, g in zip(parameters, self.anchors.gradients(parameters), strict=True):
                p.grad.add_(g, alpha=self.penalty)
        if self.orthogonal and self.chain.links:
            names = [*self.chain.links[0].factors]
            assert self.chain.adapter is not None
            earlier = [torch.cat([link.factors[n].a for link in self.chain.links]) for n in names]
            layers = self.chain.adapter.layers
            new = [next(iter(layers[n].lora_A.values())).weight for n in names]
            (self.orthogonal * orthogonality(earlier, new)).backward()

    def _noted(self, engine: Engine, kept: Sequence[Example]) -> dict[str, Tensor]:
        """Add the task to the anchors, by its kept rows; return them as tensors of a file."""
        parameters = [*self.chain.parameters()]
        fisher = [torch.zeros_like(p) for p in parameters]
        for row in kept:  # the gradient of a row's whole log-likelihood, not of its mean
            self._gradients(engine, [row], parameters)
            for total, p in zip(fisher, parameters, strict=True):
                total.add_(p.grad.square(), alpha=row.num_learned**2 / len(kept))
                p.grad = None
        self.anchors.add(fisher, parameters)
        found = {f"F/{n}": each for n, each in enumerate(self.anchors.fisher)}
        return found | {f"W/{n}": each for n, each in enumerate(self.anchors.weighted)}


def _parts(link: Link) -> dict[str, Tensor]:
    found = {f"A/{name}": each.a.contiguous() for name, each in link.factors.items()}
    return found | {f"B/{name}": each.b.contiguous() for name, each in link.factors.items()}
