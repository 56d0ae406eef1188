"""A row on its way to tokens, and what an objective's encoder is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chainlora.data.examples import Example
from chainlora.data.sources import Row

Ids = list[int]
Span = tuple[int, int]


@dataclass(slots=True)
class Draft:
    """A row on its way to an example.

    `content` is what was read of the row, as JSON takes it: the digest of the rows is taken of it,
    before anything is cut. `scored` holds, per sequence, the spans ``[start, end)`` of its targets,
    `prompt` the tokens of the prompt read alone, without demonstrations before it, whose last may
    melt into an answer's first.
    """

    index: int
    place: str
    content: Any
    sequences: Sequence[Ids] = ()
    scored: Sequence[list[Span]] = ()
    label: int | None = None
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    prompt: Ids = field(default_factory=list)
    prompt_hash: int = 0

    def example(self) -> Example:
        return Example(
            self.index,
            tuple(map(tuple, self.sequences)),
            tuple(map(tuple, self.scored)),
            self.label,
            self.references,
            self.names if self.label is not None else (),
            prompt_hash=self.prompt_hash,
        )


class Encoder(Protocol):
    """How one objective reads rows.

    A new one is a class in a file of its own, entered in `make_encoder`.
    """

    truncation: str
    """What happens to a row that is too long unless the user says otherwise (`Fit.truncation`)."""
    keeps_targets: bool
    """Whether a cut may take tokens of the prompt only."""

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        """Return the rows as tokens. Raises DataError that names a row that cannot be used."""
        ...

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row that are not read."""
        ...
