"""A rehearsal: a short stage on rows that all stages of a run kept, as many of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from math import ceil
from pathlib import Path
from typing import Any

from chainlora.config.reading import set_key
from chainlora.config.schema import PAIR_LOSSES, RunConfig
from chainlora.config.staging import Stage, make_stage, section_of, what_stages_share
from chainlora.data.kept import Kept
from chainlora.errors import RunError
from chainlora.runs.addresses import open_run
from chainlora.runs.history import History
from chainlora.runs.resuming import not_named

REHEARSAL = "rehearsal"
RATE = 0.3  # of the last stage's learning rate, and
ROWS = 256  # of each stage at most; all by the batch size are its steps: benchmarks/stages


def rehearsal(
    run: str | Path, section: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()
) -> list[Stage]:
    """Return a stage on rows that all stages of a run kept, as many of each (`rehearse`).

    A rehearsal of what the run is that was declared is returned again, and one that it ended in.
    """
    now = open_run(run)
    history = now.history
    known = [e.key for e in history.unbuilt if e.is_rehearsal and e.parent == history.head]
    after = now.key
    if now.entry is not None and now.entry.is_rehearsal:
        known.append(now.key)
        after = now.entry.parent if known == [now.key] else now.key
    own = {"name": known[0] if known else rehearsal_name(history)} | dict(section)
    for key, value in overrides:
        set_key(own, key, value)
    before = now.with_rows.config()
    if "plugins" not in own and before.plugins:
        raise RunError(not_named(f"rehearse {run}", before.plugins) + ", or --plugins [] without")
    largest = largest_rank(history, [now.key])
    stage = rehearsal_of(before, own, largest, now.run)
    return [Stage(stage.name, stage.config, after=after)]


def rehearsal_of(before: RunConfig, own: Mapping[str, Any], largest: int, run: Path) -> Stage:
    """Return a rehearsal after a stage with the config `before`; `own` are keys that it has
    otherwise, `largest` is the largest rank of a link."""
    rows = {"rehearse": True, "replay": None, "new_rows_only": False}
    rate = {} if before.train.loss in PAIR_LOSSES else {"lr": RATE * before.train.lr}
    section = dict(own) | {
        "data": rows | section_of(own, "data"),
        "train": {"loss": None} | rate | section_of(own, "train"),  # not on pairs
        "chain": {"ranks": [largest or 8]} | section_of(own, "chain"),
    }
    shared = what_stages_share(before) | {"plugins": section.pop("plugins", ())}
    shared["output"] = str(run)
    return make_stage(shared, section, 1)


def largest_rank(history: History, keys: Iterable[str]) -> int:
    """Return the largest rank of a link of the stages that entries come from, 0 where none is."""
    tied = (link for key in keys for entry in history.lineage(key) for link in entry.tied)
    return max((history.links[link].rank for link in tied), default=0)


def rehearsal_name(history: History) -> str:
    """Return a name that no entry has."""
    names = chain([REHEARSAL], (f"{REHEARSAL}-{number}" for number in count(2)))
    return next(name for name in names if history.known(name) is None)


def with_steps(config: RunConfig, kept: Iterable[Kept]) -> RunConfig:
    """Return the config of a rehearsal with its number of steps, where it does not say one: those
    of `ROWS` of each stage, or twice what that kept."""
    if not config.data.rehearse or config.chain.has_length or not config.chain.ranks:
        return config
    num_rows = sum(min(ROWS, 2 * len(e.train)) for e in kept if e.loss not in PAIR_LOSSES)
    steps = max(1, ceil(num_rows / config.train.batch_size))
    lengths = {"steps": (steps,) * len(config.chain.ranks)}
    return config.model_copy(update={"chain": config.chain.model_copy(update=lengths)})
