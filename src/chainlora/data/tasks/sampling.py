"""The splits of a task, and the samples a run draws from them.

Protocol (MeZO, arXiv 2305.17333): training and validation rows are drawn from the train split, test
rows from the validation split, by a data seed that has nothing to do with the training seed. Where
the split is too small, validation takes its rows first and training gets what is left.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chainlora.data.sources import (
    SUFFIXES,
    FileSource,
    HubSource,
    ListSource,
    Row,
    Source,
    find_file,
    iterate,
)
from chainlora.data.tasks.nested import FlatSource, flat
from chainlora.data.tasks.task import Task
from chainlora.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

# What the same split is called in the wild: SuperGLUE says val, DialogSum says dev.
_STEMS = {
    "validation": ("validation", "val", "valid", "dev"),
    "train": ("train",),
    "test": ("test",),
}
# Where one split stands in for two, its test rows are the same whatever the data seed, as a test
# split's are.
_HELD_OUT_SEED = 0
_HELD_OUT = "held out"


class Part(NamedTuple):
    """The part of a source that samples are drawn from: places of its rows."""

    source: Source
    order: Sequence[int]


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
    source: FileSource | HubSource
    if dir is not None:
        path = _split_file(task, Path(dir), split)
        if path is None:
            raise DataError(_not_found(task, Path(dir), split))
        source = FileSource(path)
    else:
        source = _hub_source(task, split)
    return flat(source, task.name)


def _hub_source(task: Task, split: str) -> HubSource:
    hub = task.hub
    if hub is None:
        raise DataError(
            f"task {task.name!r} declares no Hub dataset, so its rows must be local (got no "
            "folder); give data.dir or --data DIR, or declare `hub` in the task file"
        )
    name = hub.splits.get(split, split)
    return HubSource(hub.path, name, hub.name, hub.folder, hub.revision)


def load_split(task: Task, dir: str | Path | None, split: str) -> list[Row]:
    """Read one split, as `split_source`, into memory. Raises DataError, also on a bad row."""
    return list(iterate(split_source(task, dir, split)))


def check_split_files(task: Task, dir: str | Path) -> None:
    """Raise DataError if the folder lacks a split that samples are drawn from; reads nothing."""
    rules = task.sampling
    for split in dict.fromkeys(rule.of for rule in (rules.train, rules.validation, rules.test)):
        of = (
            rules.without_train
            if split == "train" and rules.without_train and _is_without_train(task, dir)
            else split
        )
        if _split_file(task, Path(dir), of) is None:
            raise DataError(_not_found(task, Path(dir), of))


def unseen_source(
    task: Task, dir: str | Path | None, split: str, limit: int | None = None
) -> Source:
    """Return one split to be scored: as `split_source`, but no rows that a run trains on.

    Where the split stands in for a missing train split, these are the test rows set aside from it.
    Raises DataError where there are none, as for `split_source`.
    """
    source = split_source(task, dir, split)
    if dir is None or not _is_trained_on(task, Path(dir), split):
        assert isinstance(source, FileSource | HubSource | FlatSource)
        return replace(source, limit=limit)
    stand_in, test = task.sampling.without_train, task.sampling.test
    count = _count(source)
    if test.of != stand_in:
        raise DataError(
            f"split {split!r} of task {task.name!r} is what runs train on, as {dir} has no train "
            f"split (got {count} rows); score --split {test.of}, or name the file itself as "
            "--data to score it anyway"
        )
    unseen = sorted(_hold_out(count, test.rows)[0])
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


def _is_trained_on(task: Task, dir: Path, split: str) -> bool:
    """Say whether a split stands in for a missing train split."""
    stand_in = task.sampling.without_train
    if stand_in is None or not _is_without_train(task, dir):
        return False
    return _split_file(task, dir, split) == _split_file(task, dir, stand_in)


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
        dir: as for `load_split`.
        num_train: rows to train on; None is the task's number. Fewer come when the split has fewer.
        num_validation: rows to choose by; disjoint from the training rows.
        num_test: rows to report on; disjoint from both.
        data_seed: decides the draw and nothing else.
        sampling: "protocol", or "saner" for a split that leaves small sets something to train on.

    Returns:
        "train" in drawn order (the first n are the draw for n), "validation" and "test" in file
        order.
    """
    if sampling not in ("protocol", "saner"):
        raise ConfigError(f"`sampling` must be protocol or saner (got {sampling!r})")
    rules = task.sampling
    sizes = {
        "train": num_train or rules.train.count(sampling),
        "validation": num_validation or rules.validation.count(sampling),
        "test": num_test or rules.test.count(sampling),
    }
    pools = _read_pools(task, dir, max(sizes["test"], rules.test.rows))
    drawn: dict[str, list[Row]] = {}
    for split, wanted in _by_pool(task, pools):
        source, order = pools[split].source, list(pools[split].order)
        if split != _HELD_OUT:
            random.Random(f"{data_seed} {split}").shuffle(order)
        places = {}
        for name in wanted:
            places[name], order = order[: sizes[name]], order[sizes[name] :]
        rows = _pick(source, chain.from_iterable(places.values()))
        for name, chosen in places.items():
            drawn[name] = [rows[at] for at in (chosen if name == "train" else sorted(chosen))]
    if not drawn["train"]:
        raise DataError(
            f"validation must leave rows to train on (got {len(drawn['validation'])} rows in all "
            f"for {sizes['validation']} of validation, task {task.name!r}); lower num_validation"
        )
    _log.info(
        "%s: %s rows drawn with data seed %d (%s)",
        task.name,
        ", ".join(f"{len(drawn[name])} {name}" for name in sizes),
        data_seed,
        sampling,
    )
    return {name: drawn[name] for name in sizes}


def _read_pools(task: Task, dir: str | Path | None, num_held_out: int) -> dict[str, Part]:
    """Return the rows to draw from, by split.

    `_HELD_OUT` has test rows taken out of a stand-in for train.
    """
    rules = task.sampling
    splits = dict.fromkeys(rule.of for rule in (rules.train, rules.validation, rules.test))
    stand_in = rules.without_train
    if stand_in is None or not _is_without_train(task, dir):
        return {split: _whole(task, dir, split) for split in splits}
    pools = {split: _whole(task, dir, split) for split in splits if split != "train"}
    pools["train"] = pools[stand_in] if stand_in in pools else _whole(task, dir, stand_in)
    _log.warning(
        "%s: no train split in %s; %r stands in for it%s",
        task.name,
        dir,
        stand_in,
        ", its test rows set aside with a fixed seed" if rules.test.of == stand_in else "",
    )
    if rules.test.of == stand_in:
        source, order = pools["train"]
        held_out, others = _hold_out(len(order), num_held_out)
        pools[_HELD_OUT], pools["train"] = Part(source, held_out), Part(source, sorted(others))
    return pools


def _whole(task: Task, dir: str | Path | None, split: str) -> Part:
    source = split_source(task, dir, split)
    return Part(source, range(_count(source)))


def _count(source: Source) -> int:
    """Return the number of rows, and find a bad one; none is kept."""
    return sum(1 for _ in iterate(source))


def _pick(source: Source, places: Iterable[int]) -> dict[int, Row]:
    """Return the rows at some places."""
    wanted = set(places)
    return {place: row for place, row in enumerate(iterate(source)) if place in wanted}


def _is_without_train(task: Task, dir: str | Path | None) -> bool:
    return dir is not None and _split_file(task, Path(dir), "train") is None


def _hold_out(num_rows: int, count: int) -> tuple[list[int], list[int]]:
    """Part rows into test rows, the same for every run, and the others; both in drawn order."""
    order = list(range(num_rows))
    random.Random(_HELD_OUT_SEED).shuffle(order)
    return order[:count], order[count:]


def _by_pool(task: Task, pools: Mapping[str, Part]) -> list[tuple[str, list[str]]]:
    """Return which samples come out of which pool, in the order they take their rows."""
    rules, groups = task.sampling, dict[str, list[str]]()
    held_out = _HELD_OUT in pools
    for name, rule in (
        ("test", rules.test),
        ("validation", rules.validation),
        ("train", rules.train),
    ):
        groups.setdefault(_HELD_OUT if held_out and name == "test" else rule.of, []).append(name)
    return list(groups.items())


def _split_file(task: Task, folder: Path, split: str) -> Path | None:
    stems = task.files.get(split) or _STEMS.get(split, (split,))
    return find_file(folder, stems) or find_file(folder / task.name, stems)


def _not_found(task: Task, folder: Path, split: str) -> str:
    stems = task.files.get(split) or _STEMS.get(split, (split,))
    names = f"{'|'.join(stems)}{{{','.join(SUFFIXES)}}}"
    if task.hub is None:
        other = "this task declares no Hub dataset"
    else:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        other = f"or leave the folder out to fetch {task.hub.path} from the Hub" + (
            " (HF_HUB_OFFLINE is set, so only a cached copy)" if offline else ""
        )
    have = (
        "no such folder"
        if not folder.is_dir()
        else f"neither in {folder} nor in {folder / task.name}"
    )
    return (
        f"task {task.name!r} needs its {split!r} rows as {names} (got {have}); name the folder "
        f"that holds them, {other}"
    )
