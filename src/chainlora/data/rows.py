"""`Rows`: the tokenised rows of a split, wherever they lie.

`MemoryRows` keeps a small split as Python objects; `chainlora.data.store` maps a large one from
disk. Both give the same examples.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example

COUNTED = ("rows", "rows_split", "rows_cut", "rows_dropped", "tokens_cut")
"""What is counted while rows are encoded."""


@dataclass(frozen=True)
class RowsSummary:
    """What became of the rows of a split: counts that a run reports and keeps."""

    rows: int = 0  # as they were read
    examples: int = 0  # more than rows where texts were split, fewer where rows were left out
    tokens: int = 0  # over all sequences, after cuts
    rows_split: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0  # longer than the context (data.truncation: drop)
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
    """Tokenised rows, each read on demand.

    `lengths` ([rows], int32) are the tokens of each row, over all its sequences.
    """

    def __init__(self, lengths: NDArray[np.int32], summary: RowsSummary) -> None:
        self.lengths, self.summary = lengths, summary

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def example(self, index: int) -> Example:
        """Return one row; 0 <= index < len."""

    def content(self, index: int) -> bytes:
        """Return `Example.content` of a row."""
        return self.example(index).content()

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


class MemoryRows(Rows):
    """Rows as Python objects, for some thousands of them at most."""

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        lengths = [sum(map(len, example.sequences)) for example in examples]
        super().__init__(np.array(lengths, np.int32), RowsSummary())
        self._examples = examples

    def example(self, index: int) -> Example:
        return self._examples[index]


class ReferencedRows(Rows):
    """Pairs of preferences with what they scored at the start of the run.

    `reference` is [rows, 2] float32 (`Example.reference`).
    """

    def __init__(self, rows: Rows, reference: NDArray[np.float32]) -> None:
        super().__init__(rows.lengths, rows.summary)
        self._rows, self._reference = rows, reference

    def example(self, index: int) -> Example:
        return replace(self._rows.example(index), reference=tuple(self._reference[index].tolist()))


class PickedRows(Rows):
    """Some of the rows of another."""

    def __init__(self, rows: Rows, places: NDArray[np.integer]) -> None:
        self._rows, self._places = rows, places
        lengths = rows.lengths[places]
        digest = _hashed(rows.summary.digest.encode(), places.astype("<i8").tobytes())
        tokens = int(lengths.sum())
        summary = replace(rows.summary, examples=len(places), tokens=tokens, digest=digest)
        super().__init__(lengths, summary)

    def example(self, index: int) -> Example:
        return self._rows.example(int(self._places[index]))

    def content(self, index: int) -> bytes:
        return self._rows.content(int(self._places[index]))


class JoinedRows(Rows):
    """The rows of several others, one after another, and numbered so."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._numbers = np.cumsum([0, *(part.summary.rows for part in parts)])
        summary = _joined_summary([part.summary for part in parts])
        super().__init__(np.concatenate([part.lengths for part in parts]), summary)

    def example(self, index: int) -> Example:
        part, place = self._place(index)
        found = self._parts[part].example(place)
        return replace(found, row=found.row + int(self._numbers[part])) if part else found

    def content(self, index: int) -> bytes:
        part, place = self._place(index)
        return self._parts[part].content(place)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the part that has a row, and the place of the row in it."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - int(self._ends[part]) + len(self._parts[part])


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts; of one, itself."""
    parts = [part for part in parts if len(part)] or parts[:1]
    if not parts:
        return MemoryRows()
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _joined_summary(parts: Sequence[RowsSummary]) -> RowsSummary:
    counts = ("examples", "tokens", *COUNTED)
    return RowsSummary(
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        unread=tuple(dict.fromkeys(chain.from_iterable(part.unread for part in parts))),
        digest=_hashed(*(part.digest.encode() for part in parts)),
        recognised=", ".join(dict.fromkeys(part.recognised for part in parts if part.recognised)),
    )


def _hashed(*contents: bytes) -> str:
    return hashlib.sha256(b"\n".join(contents)).hexdigest()
