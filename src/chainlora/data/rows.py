"""`Rows`: the tokenised rows of a split, wherever they lie.

`MemoryRows` keeps a small split as Python objects; `chainlora.data.store` maps a large one from
disk. Both give the same examples.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example


@dataclass(frozen=True)
class RowsSummary:
    """What became of the rows of a split: counts that a run reports and keeps."""

    rows: int = 0  # as they were read
    examples: int = 0  # more than rows where texts were split, fewer where rows were left out
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


class PickedRows(Rows):
    """Some of the rows of another."""

    def __init__(self, rows: Rows, places: NDArray[np.integer]) -> None:
        self._rows, self._places = rows, places
        self.summary = replace(
            rows.summary,
            examples=len(places),
            tokens=int(self.lengths.sum()),
            digest=_hashed(rows.summary.digest.encode(), places.astype("<i8").tobytes()),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, over all its sequences."""
        return self._rows.lengths[self._places]

    def example(self, index: int) -> Example:
        """Return one row."""
        return self._rows.example(int(self._places[index]))


class JoinedRows(Rows):
    """The rows of several others, one after another, and numbered so."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._numbers = np.cumsum([0, *(part.summary.rows for part in parts)])
        self.summary = _joined_summary([part.summary for part in parts])
        self._lengths = np.concatenate([part.lengths for part in parts])

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Return the tokens of every row, over all its sequences."""
        return self._lengths

    def example(self, index: int) -> Example:
        """Return one row."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        found = self._parts[part].example(index - int(self._ends[part]) + len(self._parts[part]))
        return replace(found, row=found.row + int(self._numbers[part])) if part else found


def first_of_row(rows: Rows, index: int) -> int:
    """Return the place of the first block of the row that an example is of."""
    while index and rows.example(index - 1).row == rows.example(index).row:
        index -= 1
    return index


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts; of one, itself."""
    parts = [part for part in parts if len(part)] or parts[:1]
    if not parts:
        return MemoryRows()
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _joined_summary(parts: Sequence[RowsSummary]) -> RowsSummary:
    counts = ("rows", "examples", "tokens", "rows_split", "rows_cut", "tokens_cut")
    return RowsSummary(
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        unread=tuple(dict.fromkeys(chain.from_iterable(part.unread for part in parts))),
        digest=_hashed(*(part.digest.encode() for part in parts)),
        recognised=", ".join(dict.fromkeys(part.recognised for part in parts if part.recognised)),
    )


def _hashed(*contents: bytes) -> str:
    return hashlib.sha256(b"\n".join(contents)).hexdigest()
