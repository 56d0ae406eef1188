"""Rehearsals: short stages on kept rows of all stages of a run, equally many of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from chainlora.config.reading import set_key
from chainlora.config.schema import PAIR_LOSSES, RunConfig
from chainlora.config.staging import Stage, make_stage, section_of, what_stages_share
from chainlora.data.kept import Kept
from chainlora.errors import RunError
from chainlora.runs.addresses import open_run
from chainlora.runs.history import REHEARSAL, History
from chainlora.runs.resuming import not_named

# both measured in benchmarks/stages
RATE = 0.3  # learning rate, as a share of the last stage's
ROWS = 256  # rows of each stage at most; all rows divided by the batch size give the steps


def rehearsal(
    run: str | Path, section: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()
) -> list[Stage]:
    """Return the stage that rehearses the head of a run (`chainlora.rehearse`).

    If that rehearsal is declared already, or if the head is a rehearsal, it is returned again.
    """
    head = open_run(run)
    history = head.history
    known = [e.key for e in history.unbuilt if e.is_rehearsal and e.parent == history.head]
    after = head.key
    if head.entry is not None and head.entry.is_rehearsal:
        known.append(head.key)
        after = head.entry.parent if known == [head.key] else head.key
    keys = {"name": known[0] if known else history.free_name(REHEARSAL)} | dict(section)
    for key, value in overrides:
        set_key(keys, key, value)
    before = head.with_rows.config()
    if "plugins" not in keys and before.plugins:
        raise RunError(not_named(f"rehearse {run}", before.plugins) + ", or --plugins [] without")
    stage = rehearsal_of(before, keys, largest_rank(history, [head.key]), head.run)
    return [Stage(stage.name, stage.config, after=after)]


def rehearsal_of(before: RunConfig, keys: Mapping[str, Any], rank: int, run: Path) -> Stage:
    """Return a rehearsal that inherits from a stage with the config `before`.

    `keys` replace inherited ones; `rank` is the default rank of its link, 0 for 8.
    """
    rows = {"rehearse": True, "replay": None, "new_rows_only": False}
    rate = {} if before.train.loss in PAIR_LOSSES else {"lr": RATE * before.train.lr}
    section = dict(keys) | {
        "data": rows | section_of(keys, "data"),
        "train": {"loss": None} | rate | section_of(keys, "train"),  # not on pairs
        "chain": {"ranks": [rank or 8]} | section_of(keys, "chain"),
    }
    plugins = section.pop("plugins", ())
    shared = what_stages_share(before) | {"plugins": plugins, "output": str(run)}
    return make_stage(shared, section, 1)


def largest_rank(history: History, keys: Iterable[str]) -> int:
    """Return the largest rank of all links below some entries, 0 without links."""
    tied = (link for key in keys for entry in history.lineage(key) for link in entry.tied)
    return max((history.links[link].rank for link in tied), default=0)


def with_steps(config: RunConfig, kept: Iterable[Kept]) -> RunConfig:
    """Return the config of a rehearsal with its number of steps, unless it has one."""
    if not config.data.rehearse or config.chain.has_length or not config.chain.ranks:
        return config
    num_rows = sum(min(ROWS, 2 * len(k.train)) for k in kept if k.loss not in PAIR_LOSSES)
    steps = max(1, ceil(num_rows / config.train.batch_size))
    lengths = {"steps": (steps,) * len(config.chain.ranks)}
    return config.model_copy(update={"chain": config.chain.model_copy(update=lengths)})
