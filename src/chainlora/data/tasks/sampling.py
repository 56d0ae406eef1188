"""The splits of a task, nested rows flattened, and the samples a run draws from them.

Protocol (MeZO, arXiv 2305.17333): training and validation rows are drawn from the train split, test
rows from the validation split, by a data seed that has nothing to do with the training seed. Where
the split is too small, validation takes its rows first and training gets what is left.
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
from chainlora.data.tasks.task import Task
from chainlora.errors import DataError

_log = logging.getLogger(__name__)

# What the same split is called in the wild: SuperGLUE says val, DialogSum says dev.
_STEMS = {
    "validation": ("validation", "val", "valid", "dev"),
    "train": ("train",),
    "test": ("test",),
}
# Where one split stands in for two, its test rows are the same whatever the data seed, as a test
# split's are.
_SEED_OF_ASIDE = 0
_SET_ASIDE = "set aside"
_Flat = Iterator[dict[str, Any]]


# --- nested rows of the original SuperGLUE files; the Hub has them flat, and flat rows pass ---


def _multirc(row: Mapping[str, Any]) -> _Flat:
    """Yield one row an answer, of answers in questions of a passage."""
    passage = row["passage"]
    for asked in passage["questions"]:
        for found in asked["answers"]:
            yield {
                "paragraph": passage["text"],
                "question": asked["question"],
                "answer": found["text"],
                "label": found["label"],
                "idx": {"paragraph": row["idx"], "question": asked["idx"], "answer": found["idx"]},
            }


def _record(row: Mapping[str, Any]) -> _Flat:
    """Yield one row a query of a passage, whose entities are spans with their last character."""
    text = row["passage"]["text"]
    spans = row["passage"]["entities"]
    for asked in row["qas"]:
        yield {
            "passage": text,
            "query": asked["query"],
            "entities": [text[span["start"] : span["end"] + 1] for span in spans],
            "answers": list(dict.fromkeys(answer["text"] for answer in asked["answers"])),
            "idx": {"passage": row["idx"], "query": asked["idx"]},
        }


_NESTED: Mapping[str, Callable[[Mapping[str, Any]], _Flat]] = {
    "multirc": _multirc,
    "record": _record,
}


@dataclass
class _FlatSource(Source):
    """The rows of another source, those flattened whose `passage` is an object."""

    source: Source
    task: str

    def __str__(self) -> str:
        return str(self.source)

    @property
    def place(self) -> str:
        return ""  # before that of a row of the source

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
    """Return the rows of a task's source, nested ones flattened."""
    return _FlatSource(source, task) if task in _NESTED else source


# --- splits ---


def split_source(task: Task, dir: str | Path | None, split: str) -> Source:
    """Return the rows of one split, in file order, nested rows flattened.

    Args:
        task: the task.
        dir: the folder that holds the task's files, or the folder above it; None fetches from the
            Hub.
        split: "train", "validation", "test" or whatever the task declares.

    Raises:
        DataError: no such rows (the other way to get them is named).
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


def check_split_files(task: Task, dir: str | Path) -> None:
    """Raise DataError if the folder lacks a split that samples are drawn from; reads nothing."""
    rules = task.sampling
    for split in (rules.train.of, rules.validation.of, rules.test.of):
        _need_file(task, Path(dir), _train_split(task, dir) if split == "train" else split)


def unseen_source(
    task: Task, dir: str | Path | None, split: str, limit: int | None = None
) -> Source:
    """Return one split to be scored: as `split_source`, but no rows that a run trains on.

    Where the split stands in for a missing train split, these are the test rows set aside from it.
    Raises DataError where there are none, as for `split_source`.
    """
    source = split_source(task, dir, split)
    stand_in, test = _train_split(task, dir), task.sampling.test
    files = [dir and _find_file(task, Path(dir), each) for each in (split, stand_in)]
    if stand_in == "train" or files[0] != files[1]:
        return replace(source, limit=limit)
    count = sum(1 for _ in source)
    if test.of != stand_in:
        raise DataError(
            f"split {split!r} of task {task.name!r} is what runs train on, as {dir} has no train "
            f"split (got {count} rows); score --split {test.of}, or name the file itself as "
            "--data to score it anyway"
        )
    source.tell_remark()
    unseen = sorted(_set_aside(count, test.rows))
    _log.warning(
        "%s: no train split in %s, so %r stands in for it: only the %d of its %d rows that no "
        "run trains on are scored",
        task.name,
        dir,
        split,
        len(unseen),
        count,
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
    """Draw the rows of a run; every row keeps the `index` it has in its split.

    Args:
        task: the task.
        dir: as for `split_source`.
        num_train: rows to train on; None is the task's number. Fewer come when the split has fewer.
        num_validation: rows to choose by; disjoint from the training rows.
        num_test: rows to report on; disjoint from both.
        data_seed: decides the draw and nothing else.
        sampling: as `data.sampling` of a config.

    Returns:
        "train" in drawn order (the first n are the draw for n), "validation" and "test" in file
        order.
    """
    if dir is not None:
        check_split_files(task, dir)
    rules, stand_in = task.sampling, _train_split(task, dir)
    draws = {"train": rules.train, "validation": rules.validation, "test": rules.test}
    given = {"train": num_train, "validation": num_validation, "test": num_test}
    sizes = {name: given[name] or draw.count(sampling) for name, draw in draws.items()}
    num_aside = max(sizes["test"], rules.test.rows) if rules.test.of == stand_in != "train" else 0
    if stand_in != "train":
        aside = ", its test rows set aside with a fixed seed" if num_aside else ""
        _log.warning("%s: no train in %s; %r stands in for it%s", task.name, dir, stand_in, aside)
    pools: dict[str, list[str]] = {}
    for name in ("test", "validation", "train"):  # in the order in which they take their rows
        of = "train" if draws[name].of == stand_in else draws[name].of
        is_aside = name == "test" and num_aside
        pools.setdefault(_SET_ASIDE if is_aside else of, []).append(name)
    drawn: dict[str, list[Row]] = {}
    for pool, names in pools.items():
        source = split_source(task, dir, stand_in if pool in ("train", _SET_ASIDE) else pool)
        source.tell_remark()
        count = sum(1 for _ in source)  # also finds a bad row; none is kept
        order, places = _order(pool, count, num_aside, data_seed), {}
        for name in names:
            places[name], order = order[: sizes[name]], order[sizes[name] :]
        rows = _pick(source, chain.from_iterable(places.values()))
        for name, chosen in places.items():
            drawn[name] = [rows[at] for at in (chosen if name == "train" else sorted(chosen))]
    if not drawn["train"]:
        raise DataError(
            f"validation must leave rows to train on (got {len(drawn['validation'])} rows in all "
            f"for {sizes['validation']} of validation, task {task.name!r}); lower num_validation"
        )
    counts = ", ".join(f"{len(drawn[name])} {name}" for name in sizes)
    _log.info("%s: %s rows drawn, data seed %d (%s)", task.name, counts, data_seed, sampling)
    return {name: drawn[name] for name in sizes}


def _order(pool: str, count: int, num_aside: int, data_seed: int) -> list[int]:
    """Return the places of a pool's rows in the order in which they are drawn."""
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
    """Return the places of test rows, the same for every run, in drawn order."""
    order = list(range(num_rows))
    random.Random(_SEED_OF_ASIDE).shuffle(order)
    return order[:count]


def _train_split(task: Task, dir: str | Path | None) -> str:
    """Return "train", or the split that stands in for it where a folder has none."""
    stand_in = task.sampling.without_train
    is_there = dir is None or _find_file(task, Path(dir), "train") is not None
    return "train" if is_there or stand_in is None else stand_in


def _stems(task: Task, split: str) -> tuple[str, ...]:
    return task.files.get(split) or _STEMS.get(split, (split,))


def _find_file(task: Task, folder: Path, split: str) -> Path | None:
    stems = _stems(task, split)
    return find_file(folder, stems) or find_file(folder / task.name, stems)


def _need_file(task: Task, folder: Path, split: str) -> Path:
    if (path := _find_file(task, folder, split)) is not None:
        return path
    names = f"{'|'.join(_stems(task, split))}{{{','.join(SUFFIXES)}}}"
    have = f"neither in {folder} nor in {folder / task.name}"
    if task.hub is None:
        other = "this task declares no Hub dataset"
    else:
        only = " (HF_HUB_OFFLINE is set, so only a cached copy)" if is_offline_mode() else ""
        other = f"or leave the folder out to fetch {task.hub.path} from the Hub{only}"
    raise DataError(
        f"task {task.name!r} needs its {split!r} rows as {names}",
        have if folder.is_dir() else "no such folder",
        f"name the folder that holds them, {other}",
    )
