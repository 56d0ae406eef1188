"""`Rows`: the tokenised rows of a split, wherever they lie.

`MemoryRows` keeps a small split as Python objects; `chainlora.data.store` maps a large one from
disk. Both give the same examples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example


@dataclass(frozen=True)
class RowsSummary:
    """What became of the rows of a split: counts that a run reports and keeps."""

    rows: int = 0  # as they were read
    examples: int = 0  # more than rows where a text was split into blocks
    tokens: int = 0  # over all sequences, after cuts
    rows_split: int = 0
    rows_cut: int = 0
    tokens_cut: int = 0
    unread: tuple[str, ...] = ()  # columns that nothing reads
    digest: str = ""
    recognised: str = ""  # the format of another tool that `auto` found

    def as_dict(self) -> dict[str, Any]:
        """Return what is not zero or empty, as JSON takes it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value
        }


class Rows(Sequence[Example]):
    """Tokenised rows: their number, the tokens of each, and each one on demand."""

    summary: RowsSummary

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, over all its sequences."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """Return one row; 0 <= index < len."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return a row, or the rows of a slice as a list."""
        places = range(len(self))[index]  # IndexError where there is no such row
        if isinstance(places, range):
            return [self.example(place) for place in places]
        return self.example(places)


@dataclass
class MemoryRows(Rows):
    """Rows as Python objects, for some thousands of them at most."""

    examples: Sequence[Example] = ()
    summary: RowsSummary = field(default_factory=RowsSummary)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.examples)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, over all its sequences."""
        counts = (sum(map(len, example.sequences)) for example in self.examples)
        return np.fromiter(counts, np.int32, len(self))

    def example(self, index: int) -> Example:
        """Return one row."""
        return self.examples[index]


@dataclass
class ReferencedRows(Rows):
    """Pairs of preferences with what they scored at the start of the run.

    `reference` is [rows, 2] float32 (`Example.reference`).
    """

    rows: Rows
    reference: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Take over what became of the rows."""
        self.summary = self.rows.summary

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, over all its sequences."""
        return self.rows.lengths

    def example(self, index: int) -> Example:
        """Return one row."""
        return replace(self.rows.example(index), reference=tuple(self.reference[index].tolist()))
