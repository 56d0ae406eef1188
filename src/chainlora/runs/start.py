"""What a stage begins on: the links of a state, as they are in the run that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from chainlora.chain.adapters import Imported
from chainlora.chain.link import Link
from chainlora.data.kept import Kept
from chainlora.runs.manifest import STAGE, Base, LinkEntry
from chainlora.runs.reading import RunReader


@dataclass(frozen=True)
class Start:
    """The state that a stage begins on; by default the base alone.

    `entries` say of each link its id, stage, strength and what it was tuned on. `next_id` is the id
    of the first link of the stage, `stage` its name. `kept` are the rows that earlier stages kept.
    What `load_start` (`loading_start.py`) read from elsewhere comes with more: `extra`, extra
    modules before the first link that the base's files lack; `adapter`, of which the base is known
    by its name alone; `tokenizer`, the folder of one of its own; `notes` for the user.
    """

    stage: str = STAGE
    links: tuple[Link, ...] = ()
    entries: tuple[LinkEntry, ...] = ()
    next_id: int = 0
    base: Base | None = None  # that the links belong to
    extra: dict[str, Tensor] = field(default_factory=dict)
    adapter: Imported | None = None
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)  # by stage, in their order


NOTHING = Start()  # the base alone


def next_id_after(reader: RunReader) -> int:
    """Return the id of the first link of a stage that comes after a run.

    It goes on after those that the run had planned, whether all of its links were made or not.
    """
    manifest = reader.manifest()
    is_run = manifest.has_run and reader.num_links is None
    planned = len(reader.config().chain.ranks) if is_run else 0
    return max(manifest.next_id, manifest.first_id + planned)
