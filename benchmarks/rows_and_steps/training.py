"""What is trained by configs: stages, replay and all at once; the base teaches general rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import product
import torch
from model import Scored
from product import HERE as FIELD
from torch import Tensor

from chainlora.config.staging import make_stages
from chainlora.data.examples import Example
from chainlora.data.kept import Kept, read_kept, write_kept
from chainlora.engine.engine import Engine
from chainlora.engine.head import divergence
from chainlora.engine.packing import PackedBatch
from chainlora.evaluation.start_rows import general_rows
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import open_run
from chainlora.runs.state import OpenState
from chainlora.training.objectives import OBJECTIVES, LanguageModelling
from chainlora.training.stages import train_stages

Rows = Mapping[str, Sequence[Mapping[str, str]]]  # to train on, by task


class Runs(product.Runs):
    """Runs below a folder, each trained where it is missing."""

    def __init__(self, work: Path, plan: Mapping[str, Any], scored: Scored) -> None:
        self.folder, self.plan, self.scored = work / "runs", plan, scored
        self.model = {"model": plan["model"], "train": plan["train"], "epochs": 1}
        self.folder.mkdir(parents=True, exist_ok=True)

    def alone(self, task: str, rows: Rows, seed: int, kept: int, times: int = 1) -> OpenState:
        """Return the run of one stage, without general rows; `times` multiplies its epochs."""
        data = self._data(kept) | {"train": str(self._file(seed, task, rows[task]))}
        chain = self._chain(self.plan["rank"], self.plan["epochs"].get(task, 1) * times)
        section = {"name": named(task), "data": data, "chain": chain}
        return self._trained(f"{seed}-{named(task)}-{kept}-{times}", [section], seed)

    def replay(self, rows: Rows, seed: int, kept: int, s: Mapping[str, Any]) -> OpenState:
        """Return the run of stages on top of each other, in the order of `rows`, which read old
        rows and, unless `general` is none, general rows."""
        sections = []
        for task, own in rows.items():
            data = self._data(kept) | {"train": str(self._file(seed, task, own))}
            data |= {"replay": s["replay"]} if sections or s["general"] != "none" else {}
            chain = self._chain(s["rank"], self._epochs(task, own, s["epochs"]))
            section = {"name": named(task), "data": data, "chain": chain}
            sections.append(section | ({"beside": False} if sections else {}))
        return self._trained(_name(f"{seed}-{kept}-replay", s), sections, seed, s)

    def at_once(self, rows: Rows, seed: int, s: Mapping[str, Any]) -> OpenState:
        """Return the run of one stage on the rows of all tasks; a row is read as often as its own
        stage reads it."""
        lengths = {task: self._epochs(task, own, s["epochs"]) for task, own in rows.items()}
        files = [
            {"path": str(self._file(seed, task, own)), "weight": float(lengths[task])}
            for task, own in rows.items()
        ]
        data = self._data(True) | {"train": files}
        data |= {"replay": s["replay"]} if s["general"] != "none" else {}
        chain = self._chain(self.plan["rank"] * len(rows), 1)
        sections = [{"name": "all", "data": data, "chain": chain}]
        return self._trained(_name(f"{seed}-all", s), sections, seed, s)

    def _data(self, kept: bool | int) -> dict[str, Any]:
        return {"task": str(FIELD / "field.yaml"), "keep_rows": kept}

    def _epochs(self, task: str, rows: Sequence[Mapping[str, str]], times: int) -> int:
        """Return the epochs of a stage times a factor, within the plan's steps of a stage."""
        own = self.plan["epochs"].get(task, 1)
        most = self.plan["longest"] * self.plan["train"]["batch_size"] // len(rows)
        return min(own * times, max(own, most))

    def _chain(self, rank: int, epochs: int) -> dict[str, Any]:
        return {"ranks": [rank], "alpha": 2.0 * rank, "epochs": [epochs]}

    def _trained(
        self, name: str, sections: Sequence[Mapping[str, Any]], seed: int, s: Mapping[str, Any] = {}
    ) -> OpenState:
        train = {**self.plan["train"], "seed": seed}
        train |= {"lr": s["rate"]} if "rate" in s else {}
        general = s.get("general", "none")
        tree = {"model": self.plan["model"], "train": train, "stages": [*sections]}
        tree |= {"output": str(self.folder / name)}
        tree |= {"start_data": "none"} if general == "none" else {}
        objective = {"completion": self.with_teacher(s["weight"])} if general == "kl" else {}
        with patch.dict(OBJECTIVES, objective):  # a name of its own could not read rows again
            train_stages(make_stages(tree), listener=self._timed(name), matrix=False)
        return open_run(self.folder / name)

    # --- general rows ---

    @cached_property
    def general(self) -> Kept:
        """The rows that the base writes after the package's prompts, once for all runs."""
        path = self.folder.parent / "general.safetensors"
        if not path.exists():
            self.scored.put({})
            model, tokenizer = self.scored.model, self.scored.tokenizer
            longest = context_length(model)
            found = general_rows(model, tokenizer, longest, lambda *done: None)
            assert found is not None
            write_kept(path, found)
        return read_kept(path)

    def with_teacher(self, weight: float) -> WithTeacher:
        """Return the loss with the divergence from the base on general rows, at this weight."""
        self.scored.put({})
        rows = [*self.general.train]
        known = {}
        for places, hidden, _ in self.scored.hidden([row.sequences[0] for row in rows]):
            for place, states in zip(places, hidden, strict=True):
                ((start, end),) = rows[place].scored[0]
                known[rows[place].sequences[0]] = states[start - 1 : end - 1].clone()
        return WithTeacher(weight, known)


def named(task: str) -> str:
    """Return a task as the name of a stage."""
    return task.replace(" ", "-")


def _name(name: str, settings: Mapping[str, Any]) -> str:
    return "-".join([name, *(f"{value}" for _, value in sorted(settings.items()))])


# --- the base as teacher on general rows, for arms that train ---


@dataclass(frozen=True)
class Taught:
    """The general rows of a batch, and the hidden states of the base that predict their tokens."""

    batch: PackedBatch
    teacher: Tensor
    terms: int  # of the loss of the other rows

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens


class WithTeacher(LanguageModelling):
    """The mean of −log p(answer token) and, on general rows, weight · mean KL(base ‖ model)."""

    def __init__(self, weight: float, known: Mapping[tuple[int, ...], Tensor]) -> None:
        super().__init__("completion")
        self.weight, self.known = weight, known

    def collate(self, engine: Engine, examples: Sequence[Example]) -> list[Any]:
        general = [row for row in examples if row.sequences[0] in self.known]
        shards = super().collate(engine, [row for row in examples if row not in general])
        if general:
            teacher = torch.cat([self.known[row.sequences[0]] for row in general])
            terms = sum(map(super().count, shards))
            shards.append(Taught(engine.pack(general), teacher, terms))
        return shards

    def count(self, batch: Any) -> int:
        return 0 if isinstance(batch, Taught) else super().count(batch)

    def loss(self, engine: Engine, batch: Any) -> Tensor:
        if not isinstance(batch, Taught):
            return super().loss(engine, batch)

        def apart(model: Any, hidden: Tensor, packed: PackedBatch) -> Tensor:
            return divergence(model, hidden, packed, batch.teacher)

        mean = engine.at_head(apart, batch.batch) / batch.batch.num_scored_tokens
        return self.weight * batch.terms * mean
