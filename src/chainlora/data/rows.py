"""`Rows`: the tokenised rows of a split.

`MemoryRows` keeps a small split as Python objects. `StoredRows` reads rows from arrays, which may
be mapped from a file. Both give the same examples.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example

ARRAYS = ("tokens", "lines", "ends")
"""What `flatten` returns."""
COUNTED = ("rows", "rows_split", "rows_cut", "rows_dropped", "tokens_cut", "pairs_equal")
"""What is counted of whole files while rows are encoded."""
SUMMED = ("examples", "tokens", *COUNTED)
"""What a summary adds up."""


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
    pairs_equal: int = 0  # whose chosen answer is the rejected one
    unread: tuple[str, ...] = ()  # columns that nothing reads
    digest: str = ""
    recognised: str = ""  # the format of another tool that `auto` found

    def as_dict(self) -> dict[str, Any]:
        """Return what is not zero or empty, as JSON takes it."""
        values = asdict(self) | {"unread": list(self.unread)}
        return {name: value for name, value in values.items() if value}


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
        return self.example(index).content()

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(len(self))[index]  # IndexError where there is no such row
        if isinstance(places, range):
            return [self.example(place) for place in places]
        return self.example(places)

    def spread(self, most: int) -> Iterator[Example]:
        """Yield up to `most` rows, spread evenly."""
        count = min(most, len(self))
        return (self.example(place * len(self) // count) for place in range(count))


class MemoryRows(Rows):
    """Rows as Python objects, for some thousands of them at most."""

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        lengths = [sum(map(len, example.sequences)) for example in examples]
        super().__init__(np.array(lengths, np.int32), RowsSummary())
        self._examples = examples

    def example(self, index: int) -> Example:
        return self._examples[index]


def flatten(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Return examples as three arrays, the form in which rows are stored.

    tokens  int32 [T]     the tokens of all sequences, one after another
    lines   uint8 [B]     a line of JSON for each example: row, tokens in each sequence, scored
                          spans, label, references, names, hash of the prompt
    ends    int64 [N, 2]  where each of N examples ends in `lines` and in `tokens`
    """
    lines, lengths = [], []
    for each in examples:
        sizes = [len(sequence) for sequence in each.sequences]
        rest = [each.row, sizes, each.scored, each.label, each.references, each.names]
        rest.append(each.prompt_hash)
        lines.append(json.dumps(rest).encode() + b"\n")
        lengths.append((len(lines[-1]), sum(sizes)))
    sequences = chain.from_iterable(each.sequences for each in examples)
    return {
        "tokens": np.fromiter(chain.from_iterable(sequences), "<i4"),
        "lines": np.frombuffer(b"".join(lines), "u1"),
        "ends": np.array(lengths, "<i8").reshape(-1, 2).cumsum(0),
    }


class StoredRows(Rows):
    """Rows in the arrays that `flatten` returns. Safe to read from several threads."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._tokens, self._lines = arrays["tokens"], arrays["lines"]
        self._ends = arrays["ends"].reshape(-1, 2)
        lengths = np.diff(self._ends[:, 1], prepend=0).astype(np.int32)
        super().__init__(lengths, RowsSummary())

    def example(self, index: int) -> Example:
        line, found = self._parts(index)
        row, sizes, scored, *rest = json.loads(line)
        label, references, names, hashed = rest
        tokens = found.tolist()
        bounds = pairwise(accumulate(sizes, initial=0))
        sequences = tuple(tuple(tokens[begin:stop]) for begin, stop in bounds)
        spans = tuple(tuple(map(tuple, each)) for each in scored)
        right = (label, tuple(references), tuple(names))
        return Example(row, sequences, spans, *right, prompt_hash=hashed)

    def content(self, index: int) -> bytes:
        line, tokens = self._parts(index)
        said = line.partition(b", ")[2].rpartition(b", ")[0]
        return b"[" + said + b"]" + tokens.tobytes()

    def _parts(self, index: int) -> tuple[bytes, NDArray[np.int32]]:
        starts = self._ends[index - 1].tolist() if index else (0, 0)
        (first, start), (last, end) = starts, self._ends[index].tolist()
        return self._lines[first:last].tobytes(), self._tokens[start:end]


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
        self._ends = list(accumulate(len(part) for part in parts))
        self._numbers = list(accumulate((part.summary.rows for part in parts), initial=0))
        said = [part.summary for part in parts]
        summary = RowsSummary(
            **{name: sum(getattr(each, name) for each in said) for name in SUMMED},
            unread=tuple(dict.fromkeys(chain.from_iterable(each.unread for each in said))),
            digest=_hashed(*(each.digest.encode() for each in said)),
            recognised=", ".join(dict.fromkeys(filter(None, (each.recognised for each in said)))),
        )
        super().__init__(np.concatenate([part.lengths for part in parts]), summary)

    def example(self, index: int) -> Example:
        part, place = self._place(index)
        found, first = self._parts[part].example(place), self._numbers[part]
        return replace(found, row=found.row + first) if first else found

    def content(self, index: int) -> bytes:
        part, place = self._place(index)
        return self._parts[part].content(place)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the part that has a row, and the place of the row in it."""
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts; of one, itself."""
    parts = [part for part in parts if len(part)] or parts[:1]
    if not parts:
        return MemoryRows()
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _hashed(*contents: bytes) -> str:
    return hashlib.sha256(b"\n".join(contents)).hexdigest()
