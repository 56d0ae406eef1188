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
"""The arrays that `flatten` returns."""
COUNTED = (
    *("rows", "rows_split", "rows_cut", "rows_dropped", "rows_joined"),
    *("tokens_cut", "pairs_equal"),
)
"""The counts of whole files, made while rows are encoded."""
SUMMED = ("examples", "tokens", *COUNTED)
"""The fields of a summary that add up."""


@dataclass(frozen=True)
class RowsSummary:
    """Counts of the rows of a split, which a run reports and keeps."""

    rows: int = 0  # rows of the source
    examples: int = 0  # more than rows if texts were split, fewer if rows were dropped
    tokens: int = 0  # over all sequences, after cuts
    rows_split: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0  # longer than the context (data.truncation: drop)
    rows_joined: int = 0  # nothing separates the prompt and the completion
    tokens_cut: int = 0
    pairs_equal: int = 0  # pairs whose chosen and rejected answers are equal
    unread: tuple[str, ...] = ()  # columns that are not read
    digest: str = ""
    recognised: str = ""  # the format of another tool, if `auto` detected one
    columns: str = ""  # which columns are prompt and completion, if `auto` detected that

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are not zero or empty, for JSON."""
        values = asdict(self) | {"unread": list(self.unread)}
        return {name: value for name, value in values.items() if value}


class Rows(Sequence[Example]):
    """Tokenised rows, each read on demand.

    `lengths` ([rows], int32) counts the tokens of each row over all its sequences.
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
        places = range(len(self))[index]  # raises IndexError
        if isinstance(places, range):
            return [self.example(place) for place in places]
        return self.example(places)

    def spread(self, most: int) -> Iterator[Example]:
        """Yield up to `most` rows, spread evenly."""
        count = min(most, len(self))
        return (self.example(place * len(self) // count) for place in range(count))


class MemoryRows(Rows):
    """Rows as Python objects, for a few thousand rows at most."""

    def __init__(self, examples: Sequence[Example] = ()) -> None:
        lengths = [sum(map(len, example.sequences)) for example in examples]
        super().__init__(np.array(lengths, np.int32), RowsSummary())
        self._examples = examples

    def example(self, index: int) -> Example:
        return self._examples[index]


def flatten(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Return examples as the three arrays in which rows are stored.

    tokens  int32 [T]     the tokens of all sequences, one after another
    lines   uint8 [B]     a line of JSON for each example: row, tokens in each sequence, scored
                          spans, label, references, names, hash of the prompt, two answer hashes
    ends    int64 [N, 2]  where each of N examples ends in `lines` and in `tokens`
    """
    lines, lengths = [], []
    for row in examples:
        sizes = [len(sequence) for sequence in row.sequences]
        rest = [row.row, sizes, row.scored, row.label, row.references, row.names]
        rest += [row.prompt_hash, *row.answer_hashes]
        lines.append(json.dumps(rest).encode() + b"\n")
        lengths.append((len(lines[-1]), sum(sizes)))
    sequences = chain.from_iterable(row.sequences for row in examples)
    return {
        "tokens": np.fromiter(chain.from_iterable(sequences), "<i4"),
        "lines": np.frombuffer(b"".join(lines), "u1"),
        "ends": np.array(lengths, "<i8").reshape(-1, 2).cumsum(0),
    }


class StoredRows(Rows):
    """Rows in the arrays that `flatten` returns. Several threads can read them."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._tokens, self._lines = arrays["tokens"], arrays["lines"]
        self._ends = arrays["ends"].reshape(-1, 2)
        lengths = np.diff(self._ends[:, 1], prepend=0).astype(np.int32)
        super().__init__(lengths, RowsSummary())

    def example(self, index: int) -> Example:
        line, array = self._parts(index)
        row, sizes, scored, label, references, names, prompt, *answer = json.loads(line)
        tokens = array.tolist()
        bounds = pairwise(accumulate(sizes, initial=0))
        sequences = tuple(tuple(tokens[begin:stop]) for begin, stop in bounds)
        spans = tuple(tuple(map(tuple, pairs)) for pairs in scored)
        right = (label, tuple(references), tuple(names))
        hashes: Any = {"prompt_hash": prompt, "answer_hashes": tuple(answer)}
        return Example(row, sequences, spans, *right, **hashes)

    def content(self, index: int) -> bytes:
        """Return the bytes of `Example.content`: the line without row number and hashes."""
        line, tokens = self._parts(index)
        rest = line.partition(b", ")[2].rsplit(b", ", 3)[0]
        return b"[" + rest + b"]" + tokens.tobytes()

    def _parts(self, index: int) -> tuple[bytes, NDArray[np.int32]]:
        first, start = self._ends[index - 1].tolist() if index else (0, 0)
        last, end = self._ends[index].tolist()
        return self._lines[first:last].tobytes(), self._tokens[start:end]


class ReferencedRows(Rows):
    """Pairs of preferences with their scores at the start of the run ([rows, 2], float32)."""

    def __init__(self, rows: Rows, reference: NDArray[np.float32]) -> None:
        super().__init__(rows.lengths, rows.summary)
        self._rows, self._reference = rows, reference

    def example(self, index: int) -> Example:
        return replace(self._rows.example(index), reference=tuple(self._reference[index].tolist()))


class PickedRows(Rows):
    """A selection of the rows of another object."""

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
    """The rows of several parts, one after another; their row numbers continue."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self._numbers = list(accumulate((part.summary.rows for part in parts), initial=0))
        parts_of = [part.summary for part in parts]
        summary = RowsSummary(
            **{name: sum(getattr(part, name) for part in parts_of) for name in SUMMED},
            unread=tuple(dict.fromkeys(chain.from_iterable(part.unread for part in parts_of))),
            digest=_hashed(*(part.digest.encode() for part in parts_of)),
            recognised=", ".join(dict.fromkeys(p.recognised for p in parts_of if p.recognised)),
            columns="; ".join(dict.fromkeys(part.columns for part in parts_of if part.columns)),
        )
        super().__init__(np.concatenate([part.lengths for part in parts]), summary)

    def example(self, index: int) -> Example:
        part, place = self._place(index)
        example, first = self._parts[part].example(place), self._numbers[part]
        return replace(example, row=example.row + first) if first else example

    def content(self, index: int) -> bytes:
        part, place = self._place(index)
        return self._parts[part].content(place)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the part that contains a row, and the index of the row in that part."""
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts; a single part is returned itself."""
    parts = [part for part in parts if len(part)] or parts[:1]
    if not parts:
        return MemoryRows()
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _hashed(*contents: bytes) -> str:
    return hashlib.sha256(b"\n".join(contents)).hexdigest()
