"""What is trained in the study: stages, combinations, replay and tasks in turn, by configs.

Two constants are set: a stage keeps 32 rows (the package: up to 1,000), and what the base writes as
general rows is written once for all runs, which are the same 64 rows for each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora import Link, combine, open_run
from chainlora.config.staging import Stage, make_stages
from chainlora.data import splits
from chainlora.data.examples import Example
from chainlora.data.kept import Kept, read_kept, write_kept
from chainlora.evaluation import start_rows
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState
from chainlora.training.events import EntryBuilt, Event
from chainlora.training.stages import train_stages
from chainlora_lab.in_turn import learn_in_turn
from chainlora_lab.ways.regularisers import Regulariser

HERE = Path(__file__).parent
_WRITE_GENERAL, _ALL = start_rows.general_rows, splits.SAMPLE


def limit_rows(kept: int, output: Path) -> None:
    """Let stages keep so many rows, and runs share general rows."""
    file = output / "general.safetensors"

    def general_rows(*args: Any) -> Kept:
        if not file.exists():
            splits.SAMPLE = _ALL
            try:
                found = _WRITE_GENERAL(*args)
            finally:
                splits.SAMPLE = kept
            assert found is not None
            write_kept(file, found)
        return read_kept(file)

    splits.SAMPLE = kept
    start_rows.general_rows = general_rows


class Runs:
    """Runs below a folder, each trained where it is missing."""

    def __init__(self, output: Path, model: Mapping[str, Any], kept: int) -> None:
        self.folder, self.model = output / "runs", dict(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        limit_rows(kept, output)

    def stages(
        self,
        name: str,
        rows: Mapping[str, Sequence[Mapping[str, str]]],
        seed: int,
        rate: float,
        *,
        replay: float | None = None,
        general: bool = True,
        rank: int = 8,
    ) -> OpenState:
        """Return the run of a stage for each task: beside each other and combined, or with `replay`
        on top of each other, which reads kept rows of the earlier ones and, if `general`, general
        rows."""
        sections = []
        for task, own in rows.items():
            data: dict[str, Any] = {"train": str(self._file(seed, task, own))}
            section: dict[str, Any] = {"name": task, "data": data}
            if replay is not None:
                section["beside"] = False
                if general or sections:
                    data["replay"] = replay
            sections.append(section)
        more = {"stages": sections} | ({} if general else {"start_data": "none"})
        return self._run(name, more, seed, rate, rank)

    def at_rank(self, rank: int, run: OpenState) -> tuple[Sequence[Link], float]:
        """Return the links of a run's stages combined again, and the seconds that it took."""
        name = f"{run.run.name}-{rank}"
        if not (self.folder / name).exists():
            began = time.process_time()
            combine(run.run, rank=rank, output=self.folder / name)
            spent = {"combination": round(time.process_time() - began, 1)}
            (self.folder / f"{name}.costs.json").write_text(json.dumps(spent))
        return open_run(self.folder / name).links(), self.costs(name)["combination"]

    def at_once(
        self,
        name: str,
        rows: Mapping[str, Sequence[Mapping[str, str]]],
        seed: int,
        rate: float,
        rank: int,
    ) -> OpenState:
        """Return the run of one stage on the rows of all tasks, and no others."""
        files = [str(self._file(seed, task, own)) for task, own in rows.items()]
        section = {"name": "all", "data": {"train": files}}
        return self._run(name, {"stages": [section], "start_data": "none"}, seed, rate, rank)

    def in_turn(
        self,
        name: str,
        rows: Mapping[str, Sequence[Mapping[str, str]]],
        seed: int,
        rate: float,
        regulariser: Regulariser,
    ) -> dict[str, Sequence[Link]]:
        """Return the links right after each task, learned one after the other by a LoRA with
        something added to its loss; no general rows."""
        sections = [
            {"name": task, "data": {"train": str(self._file(seed, task, own))}}
            for task, own in rows.items()
        ]
        stages = self._stages(name, {"stages": sections, "start_data": "none"}, seed, rate, 8)
        base, listener = OpenBase.of_config(stages[0].config), self._timed(name)
        states = learn_in_turn(stages, self.folder / name, regulariser, base, listener)
        return {task: state.links() for task, state in states.items()}

    def _run(
        self, name: str, more: Mapping[str, Any], seed: int, rate: float, rank: int
    ) -> OpenState:
        stages = self._stages(name, more, seed, rate, rank)
        train_stages(stages, listener=self._timed(name), matrix=False)
        return open_run(self.folder / name)

    def _stages(
        self, name: str, more: Mapping[str, Any], seed: int, rate: float, rank: int
    ) -> list[Stage]:
        tree = self.model | {
            "data": {"task": str(HERE / "field.yaml")},
            "chain": {"ranks": [rank], "alpha": 2.0 * rank, "epochs": [self.model["epochs"]]},
            "train": dict(self.model["train"]) | {"lr": rate, "seed": seed},
            "output": str(self.folder / name),
        }
        del tree["epochs"]
        return make_stages(tree | more)

    def _file(self, seed: int, task: str, rows: Sequence[Mapping[str, str]]) -> Path:
        path = self.folder.parent / "rows" / f"{seed}-{len(rows)}" / f"{task}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            partial = path.with_suffix(".part")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        return path

    # --- what was spent ---

    def _timed(self, name: str) -> Any:
        file = self.folder / f"{name}.costs.json"
        last = time.process_time()

        def tell(event: Event) -> None:
            nonlocal last
            if isinstance(event, EntryBuilt):
                spent, now = self.costs(name), time.process_time()
                file.write_text(json.dumps(spent | {event.entry: round(now - last, 1)}))
                print(f"  {name} {event.entry}: {now - last:.0f} s", flush=True)
                last = now

        return tell

    def costs(self, name: str) -> dict[str, float]:
        """Return the processor seconds of each entry of a run, those of a stopped one left out."""
        file = self.folder / f"{name}.costs.json"
        found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        return found


def kept_rows(state: OpenState, task: str) -> list[Example]:
    """Return the training rows that a stage kept."""
    rows = state.kept([task])[task].train
    return [rows[place] for place in range(len(rows))]
