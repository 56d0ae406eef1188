"""`Start`: the state or adapter that a stage begins on, read before a model is loaded."""

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
    """The start of a stage; by default the base alone."""

    state: OpenState | None = None  # of the same run, another run or a saved chain
    links: tuple[Link, ...] = ()
    adapter: Imported | None = None  # whose base is known only by its name
    tokenizer: Path | None = None  # folder of another tokenizer than the base's
    notes: tuple[str, ...] = ()  # warnings for the user

    @property
    def kept(self) -> dict[str, Kept]:
        """Return the kept rows of earlier stages, by stage in their order."""
        return {} if self.state is None else self.state.kept()

    @property
    def stages(self) -> list[str]:
        """Return the names of earlier stages; a new stage cannot have one of them."""
        if self.adapter is not None:
            return [START]
        if self.state is None:
            return []
        return [entry.key for entry in self.state.lineage if entry.kind != "mix"]


NOTHING = Start()  # the base alone
