"""The tasks of the paper's tables, and the rows that a cell draws of one.

Protocol (MeZO, arXiv 2305.17333): training and validation rows are drawn from the train split, test
rows from the validation split. The data seed is independent of the training seed. If the train
split is too small, validation takes its rows first and training gets the rest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from chainlora import load_task as load_file
from chainlora.config.data import DataConfig, Home
from chainlora.data.sources import FileSource, HubSource, find_file
from chainlora.data.splits import check_files
from chainlora.data.tasks import Task
from chainlora.errors import ConfigError, DataError, nearest
from chainlora_lab.outputs import write_whole

Rows = list[Mapping[str, Any]]
Data = TypeVar("Data", bound=DataConfig)

FOLDER = Path(__file__).parent / "tasks"
_STEMS = {"validation": ("validation", "val")}  # SuperGLUE says val
# If one split replaces two, its test rows do not depend on the data seed, as with a test split.
_SEED_OF_ASIDE = 0


@dataclass(frozen=True)
class Protocol:
    """Where the rows of a task are on the Hub, and how many a cell draws."""

    hub: Mapping[str, Any] = field(default_factory=dict)  # keys of `HubSource`
    num_train: int = 1000
    num_validation: int = 500
    num_test: int = 1000
    saner: int | None = None  # validation rows of `sampling: saner`
    test: str = "validation"  # the split that test rows are drawn from
    without_train: str | None = None  # the split that replaces a missing train split


def _super_glue(folder: str) -> dict[str, str]:
    # the main branch has a script, which is never run
    return {"path": "aps/super_glue", "folder": folder, "revision": "refs/convert/parquet"}


PROTOCOLS: Mapping[str, Protocol] = {
    "boolq": Protocol(_super_glue("boolq"), without_train="validation"),
    "cb": Protocol(_super_glue("cb"), num_validation=100),
    "copa": Protocol(_super_glue("copa"), num_validation=100),
    "gsm8k": Protocol({"path": "openai/gsm8k", "name": "main"}, test="test"),
    "multirc": Protocol(_super_glue("multirc")),
    "rte": Protocol(_super_glue("rte")),
    "sst2": Protocol({"path": "nyu-mll/glue", "name": "sst2"}),
    "wic": Protocol(_super_glue("wic")),
    # of 554 rows the protocol trains on 54, `saner` on 450
    "wsc": Protocol(_super_glue("wsc.fixed"), saner=104),
}


class CellData(DataConfig):
    """The rows of a cell: those of a run, or without `train` those that are drawn for a task."""

    # the folder of the task's files, or the folder above; None: from the Hub
    dir: Annotated[str | None, Home] = None
    data_seed: Annotated[int, Field(ge=-(2**32), lt=2**32)] = 0
    # `saner` leaves small tasks (WSC) more rows to train on
    sampling: Literal["protocol", "saner"] = "protocol"

    @model_validator(mode="after")
    def _check_sources(self) -> CellData:
        if self.is_drawn and (self.task is None or self.validation or self.test):
            got = "rows to score alone" if self.validation or self.test else "neither"
            raise ValueError(f"`data` must name a `train` file, or a `task` alone (got {got})")
        if not self.is_drawn and self.dir is not None:
            rule = "`data.dir` and `data.train` exclude each other"
            raise ValueError(f"{rule} (got both); keep one")
        return self

    @property
    def is_drawn(self) -> bool:
        return self.train is None

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS.get(str(self.task), Protocol())

    def size(self, split: str) -> int:
        """Return how many rows of a split are drawn, unless there are fewer."""
        own = self.protocol.saner if (split, self.sampling) == ("validation", "saner") else None
        size: int = getattr(self, f"num_{split}") or own or getattr(self.protocol, f"num_{split}")
        return size


def task_file(task: str) -> Path:
    """Return the file of a task of the paper, or the path of another one.

    Raises ConfigError for an unknown name (nearest named).
    """
    if task in PROTOCOLS:
        return FOLDER / f"{task}.yaml"
    if Path(task).suffix.lower() not in (".yaml", ".yml"):
        rule = f"task must be one of {', '.join(PROTOCOLS)}, or a .yaml file"
        raise ConfigError(rule, f"{task!r}{nearest(task, PROTOCOLS)}")
    return Path(task)


def load_task(task: str) -> Task:
    """Load a task of the paper by name, or any task file by path. Raises ConfigError."""
    return load_file(task_file(task))


def with_task_file(data: Data) -> Data:
    """Return a section whose task is a file, as a run needs it."""
    path = None if data.task is None else str(task_file(data.task))
    return data.model_copy(update={"task": path})


def check_rows(data: DataConfig, loss: str | None) -> None:
    """Raise ChainLoRAError if the rows of a cell are missing, or have no known format."""
    if not isinstance(data, CellData) or not data.is_drawn:
        check_files(with_task_file(data), loss)
    elif data.dir is not None:
        for split in _splits(data):
            _need_file(data, split)
    elif data.task not in PROTOCOLS:
        raise DataError(f"task {data.task!r} must have rows", "no folder", "give data.dir")


def with_files(data: CellData, folder: Path) -> CellData:
    """Write the rows that a cell draws to files in `folder`; return the section that names them."""
    files: dict[str, str] = {}
    for split, rows in draw(data).items() if data.is_drawn else ():
        if rows:
            files[split] = str(folder / f"{split}.jsonl")
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_whole(Path(files[split]), "".join(lines))
    return with_task_file(data).model_copy(update=files)


def draw(data: CellData) -> dict[str, Rows]:
    """Draw disjoint splits: "train" in drawn order (the first n rows are the draw for n), the
    others in file order."""
    sizes = {name: data.size(name) for name in ("train", "validation", "test")}
    of_train, of_test = _splits(data)
    rows = read_split(data, of_train)
    aside = _shuffled(range(len(rows)), _SEED_OF_ASIDE) if of_test == of_train else []
    aside = aside[: max(sizes["test"], data.protocol.num_test)]
    order = _shuffled(sorted({*range(len(rows))}.difference(aside)), f"{data.data_seed} train")
    tests = rows if aside else read_split(data, of_test)
    chosen = aside or _shuffled(range(len(tests)), f"{data.data_seed} {of_test}")
    validation, rest = order[: sizes["validation"]], order[sizes["validation"] :]
    if not rest:
        raise DataError(
            f"validation must leave rows to train on (got {len(rows)} rows in all, "
            f"num_validation {sizes['validation']}, task {data.task!r}); lower num_validation"
        )
    return {
        "train": [rows[place] for place in rest[: sizes["train"]]],
        "validation": [rows[place] for place in sorted(validation)],
        "test": [tests[place] for place in sorted(chosen[: sizes["test"]])],
    }


def _shuffled(places: Sequence[int], seed: int | str) -> list[int]:
    order = [*places]
    random.Random(seed).shuffle(order)
    return order


def _splits(data: CellData) -> tuple[str, str]:
    """Return the splits that training rows and test rows are drawn from."""
    is_missing = data.dir is not None and _find_file(data, "train") is None
    return (is_missing and data.protocol.without_train) or "train", data.protocol.test


def read_split(data: CellData, split: str) -> Rows:
    """Return all rows of a split, in file order: of `data.dir`, or from the Hub."""
    if data.dir is not None:
        rows: Rows = list(FileSource(_need_file(data, split)))
    else:
        check_rows(data, None)
        rows = list(HubSource(split=split, **data.protocol.hub))
    return [row for each in rows for row in _answers(each)] if data.task == "multirc" else rows


def _answers(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a row for each answer of a nested MultiRC row. Rows of the Hub are flat already."""
    passage = row.get("passage")
    if not isinstance(passage, Mapping):
        yield row
        return
    for question in passage["questions"]:
        for answer in question["answers"]:
            numbers = {"question": question["idx"], "answer": answer["idx"]}
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
                "idx": {"paragraph": row["idx"]} | numbers,
            }


def _find_file(data: CellData, split: str) -> Path | None:
    folder, stems = Path(str(data.dir)), _STEMS.get(split, (split,))
    return find_file(folder, stems) or find_file(folder / Path(str(data.task)).stem, stems)


def _need_file(data: CellData, split: str) -> Path:
    if (path := _find_file(data, split)) is None:
        hub, folder = data.protocol.hub, Path(str(data.dir))
        rule = f"task {data.task!r} needs its {split!r} rows"
        got = f"neither in {folder} nor in {folder / Path(str(data.task)).stem}"
        other = f", or leave the folder out to fetch {hub['path']} from the Hub" if hub else ""
        raise DataError(rule, got, f"name the folder that contains them{other}")
    return path
