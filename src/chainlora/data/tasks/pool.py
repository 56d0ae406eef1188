"""Rows to draw samples from, by number, however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from chainlora.data.sources import Row, Source, iterate

_KEPT = 100_000  # rows in memory: about a kilobyte each


class Pool:
    """The rows of a source by number: kept while there are few, read again where there are many."""

    def __init__(self, source: Source) -> None:
        self.source = source
        rows = iterate(source)
        self._kept = list(islice(rows, _KEPT))
        rest = sum(1 for _ in rows)  # this also finds a bad row
        self._count = len(self._kept) + rest

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._count

    def pick(self, places: Sequence[int]) -> list[Row]:
        """Return the rows at some places, in the order of these."""
        if self._count == len(self._kept):
            return [self._kept[place] for place in places]
        wanted = set(places)
        found = {place: row for place, row in enumerate(iterate(self.source)) if place in wanted}
        return [found[place] for place in places]


class Part(NamedTuple):
    """The part of a pool that samples are drawn from, by number."""

    pool: Pool
    order: Sequence[int]
