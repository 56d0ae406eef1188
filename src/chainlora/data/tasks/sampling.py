"""Find the splits of a task, flatten nested rows, and draw the samples of a run.

Protocol (MeZO, arXiv 2305.17333): training and validation rows are drawn from the train split, test
rows from the validation split. The data seed is independent of the training seed. If the train
split is too small, validation takes its rows first and training gets the rest.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from chainlora.data.readers import Record, bad_row
from chainlora.data.sources import (
    SUFFIXES,
    FileSource,
    HubSource,
    ListSource,
    Row,
    Source,
    find_file,
)
from chainlora.data.tasks.task import Draw, Task
from chainlora.errors import DataError

_log = logging.getLogger(__name__)

# File names in use for the same split: SuperGLUE says val, DialogSum says dev.
_STEMS = {
    "validation": ("validation", "val", "valid", "dev"),
    "train": ("train",),
    "test": ("test",),
}
# If one split replaces two, its test rows do not depend on the data seed, as with a test split.
_SEED_OF_ASIDE = 0
_SET_ASIDE = "set aside"
_Flat = Iterator[dict[str, Any]]


# --- nested rows of the original SuperGLUE files; rows from the Hub are flat already ---


def _multirc(row: Mapping[str, Any]) -> _Flat:
    """Yield a row for each answer to each question about a passage."""
    passage = row["passage"]
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


def _record(row: Mapping[str, Any]) -> _Flat:
    """Yield a row for each query about a passage. The `end` of an entity is its last character."""
    text = row["passage"]["text"]
    spans = row["passage"]["entities"]
    for query in row["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": [text[span["start"] : span["end"] + 1] for span in spans],
            "answers": list(dict.fromkeys(answer["text"] for answer in query["answers"])),
            "idx": {"passage": row["idx"], "query": query["idx"]},
        }


_NESTED: Mapping[str, Callable[[Mapping[str, Any]], _Flat]] = {
    "multirc": _multirc,
    "record": _record,
}


@dataclass
class _FlatSource(Source):
    """The rows of another source. Rows whose `passage` is an object are flattened."""

    source: Source
    task: str

    def __str__(self) -> str:
        return str(self.source)

    @property
    def place(self) -> str:
        return ""  # the number of a record is the whole origin of the nested row

    def records(self, first: int = 0) -> Iterator[Record]:
        flat = (
            Record(row.origin, values) for row in self.source for values in self._flattened(row)
        )
        return islice(flat, first, None)

    def _flattened(self, row: Row) -> list[dict[str, Any]]:
        if not isinstance(row.get("passage"), Mapping):
            return [dict(row)]
        try:
            return list(_NESTED[self.task](row))
        except (KeyError, TypeError) as error:
            rule = f"a nested row of task {self.task!r} must have the form of SuperGLUE"
            remedy = "correct it or write flat rows"
            raise bad_row(rule, f"no {error}", row.origin, remedy) from None

    def remark(self) -> str:
        return self.source.remark()

    def state(self) -> object:
        return self.source.state()

    def identity(self) -> str:
        return f"flat {self.task} {self.limit} {self.skip} {self.source.identity()}"


def flat(source: Source, task: str) -> Source:
    """Return a task's source with nested rows flattened."""
    return _FlatSource(source, task) if task in _NESTED else source


# --- splits ---


def split_source(task: Task, dir: str | Path | None, split: str) -> Source:
    """Return the rows of one split, in file order, nested rows flattened.

    `dir` is the folder with the task's files, or the folder above it; None fetches from the Hub.
    Raises DataError if there are no such rows, which names the other way to get them.
    """
    if dir is not None:
        return flat(FileSource(_need_file(task, Path(dir), split)), task.name)
    hub = task.hub
    if hub is None:
        raise DataError(
            f"task {task.name!r} declares no Hub dataset, so its rows must be local (got no "
            "folder); give data.dir or --data DIR, or declare `hub` in the task file"
        )
    name = hub.splits.get(split, split)
    return flat(HubSource(hub.path, name, hub.name, hub.folder, hub.revision), task.name)


def split_files(task: Task, dir: str | Path) -> list[Path]:
    """Return the files that samples are drawn from. Raises DataError if the folder lacks one."""
    rules, stand_in = task.sampling, _train_split(task, dir)
    splits = dict.fromkeys((rules.train.of, rules.validation.of, rules.test.of))
    return [_need_file(task, Path(dir), stand_in if s == "train" else s) for s in splits]


def unseen_source(
    task: Task, dir: str | Path | None, split: str, limit: int | None = None
) -> Source:
    """Return one split for scoring: like `split_source`, without rows that a run trains on.

    If the split replaces a missing train split, these are the test rows set aside from it.
    """
    source = split_source(task, dir, split)
    stand_in, test = _train_split(task, dir), task.sampling.test
    files = [dir and _find_file(task, Path(dir), name) for name in (split, stand_in)]
    if stand_in == "train" or files[0] != files[1]:
        return replace(source, limit=limit)
    count = sum(1 for _ in source)
    if test.of != stand_in:
        rule = f"cannot score split {split!r} of task {task.name!r}: runs train on it, as {dir} has"
        remedy = f"score --split {test.of}, or give the file itself as --data to score it anyway"
        raise DataError(f"{rule} no train split", f"{count} rows", remedy)
    source.warn_of_remark()
    unseen = sorted(_set_aside(count, test.rows))
    _log.warning(
        f"{task.name}: no train split in {dir}; {split!r} replaces it. Scoring only the "
        f"{len(unseen)} of its {count} rows that no run trains on"
    )
    return ListSource(list(_pick(source, unseen[:limit]).values()))


def sample_splits(
    task: Task,
    dir: str | Path | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
    data_seed: int = 0,
    sampling: str = "protocol",
) -> dict[str, list[Row]]:
    """Draw the rows of a run; every row keeps its `index` in its split.

    The splits are disjoint. A number that is None is the task's; a smaller split gives fewer rows.
    "train" is in drawn order (the first n rows are the draw for n), the others in file order.
    """
    if dir is not None:
        split_files(task, dir)
    rules, stand_in = task.sampling, _train_split(task, dir)
    draws = {"train": rules.train, "validation": rules.validation, "test": rules.test}
    given = {"train": num_train, "validation": num_validation, "test": num_test}
    sizes = {name: given[name] or draw.count(sampling) for name, draw in draws.items()}
    num_aside = max(sizes["test"], rules.test.rows) if rules.test.of == stand_in != "train" else 0
    if stand_in != "train":
        aside = "; its test rows are set aside with a fixed seed" if num_aside else ""
        _log.warning(f"{task.name}: no train in {dir}; {stand_in!r} replaces it{aside}")
    drawn: dict[str, list[Row]] = {}
    for pool, names in _pools(draws, stand_in, num_aside).items():
        source = split_source(task, dir, stand_in if pool in ("train", _SET_ASIDE) else pool)
        source.warn_of_remark()
        count = sum(1 for _ in source)  # also finds a bad row before any is kept
        order, places = _order(pool, count, num_aside, data_seed), {}
        for name in names:
            places[name], order = order[: sizes[name]], order[sizes[name] :]
        rows = _pick(source, chain.from_iterable(places.values()))
        for name, chosen in places.items():
            drawn[name] = [rows[at] for at in (chosen if name == "train" else sorted(chosen))]
    if not drawn["train"]:
        raise DataError(
            f"validation must leave rows to train on (got {len(drawn['validation'])} rows in all, "
            f"num_validation {sizes['validation']}, task {task.name!r}); lower num_validation"
        )
    counts = ", ".join(f"{len(drawn[name])} {name}" for name in sizes)
    _log.info("%s: %s rows drawn, data seed %d (%s)", task.name, counts, data_seed, sampling)
    return {name: drawn[name] for name in sizes}


def _pools(draws: Mapping[str, Draw], stand_in: str, num_aside: int) -> dict[str, list[str]]:
    """Return the splits to draw by the pool of rows that they share, in the order of drawing."""
    pools: dict[str, list[str]] = {}
    for name in ("test", "validation", "train"):
        of = "train" if draws[name].of == stand_in else draws[name].of
        is_aside = name == "test" and num_aside
        pools.setdefault(_SET_ASIDE if is_aside else of, []).append(name)
    return pools


def _order(pool: str, count: int, num_aside: int, data_seed: int) -> list[int]:
    """Return the row numbers of a pool in the order of drawing."""
    if pool == _SET_ASIDE:
        return _set_aside(count, num_aside)
    order = list(range(count))
    if num_aside and pool == "train":
        order = sorted({*order}.difference(_set_aside(count, num_aside)))
    random.Random(f"{data_seed} {pool}").shuffle(order)
    return order


def _pick(source: Source, places: Iterable[int]) -> dict[int, Row]:
    wanted = set(places)
    return {place: row for place, row in enumerate(source) if place in wanted}


def _set_aside(num_rows: int, count: int) -> list[int]:
    """Return the row numbers of set-aside test rows in drawn order, the same for every run."""
    order = list(range(num_rows))
    random.Random(_SEED_OF_ASIDE).shuffle(order)
    return order[:count]


def _train_split(task: Task, dir: str | Path | None) -> str:
    """Return "train", or the split that replaces it if the folder has no train split."""
    stand_in = task.sampling.without_train
    has_train = dir is None or _find_file(task, Path(dir), "train") is not None
    return "train" if has_train or stand_in is None else stand_in


def _stems(task: Task, split: str) -> tuple[str, ...]:
    return task.files.get(split) or _STEMS.get(split, (split,))


def _find_file(task: Task, folder: Path, split: str) -> Path | None:
    stems = _stems(task, split)
    return find_file(folder, stems) or find_file(folder / task.name, stems)


def _need_file(task: Task, folder: Path, split: str) -> Path:
    if (path := _find_file(task, folder, split)) is not None:
        return path
    names = f"{'|'.join(_stems(task, split))}{{{','.join(SUFFIXES)}}}"
    searched = f"neither in {folder} nor in {folder / task.name}"
    if task.hub is None:
        other = "this task declares no Hub dataset"
    else:
        only = " (HF_HUB_OFFLINE is set, so only a cached copy)" if is_offline_mode() else ""
        other = f"or leave the folder out to fetch {task.hub.path} from the Hub{only}"
    raise DataError(
        f"task {task.name!r} needs its {split!r} rows as {names}",
        searched if folder.is_dir() else "no such folder",
        f"name the folder that contains them, {other}",
    )
