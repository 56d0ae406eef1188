"""What a stage begins on, read before there is a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chainlora.chain.adapters import Imported
from chainlora.chain.link import Link
from chainlora.data.kept import Kept
from chainlora.runs.history import START
from chainlora.runs.state import OpenState


@dataclass(frozen=True)
class Start:
    """What a stage begins on; by default the base alone.

    It is a `state` of the stage's own run, of another run or a saved chain, or an imported
    `adapter`, of which the base is known by its name alone. What was read from elsewhere comes with
    more: `tokenizer`, the folder of one of its own; `notes` for the user.
    """

    state: OpenState | None = None
    links: tuple[Link, ...] = ()
    adapter: Imported | None = None
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> dict[str, Kept]:
        """Return the rows that earlier stages kept, by stage in their order."""
        return {} if self.state is None else self.state.kept()

    @property
    def stages(self) -> list[str]:
        """Return the names of the stages that are there: none of them names a new one."""
        if self.adapter is not None:
            return [START]
        if self.state is None:
            return []
        return [entry.key for entry in self.state.lineage if entry.kind != "mix"]


NOTHING = Start()  # the base alone
