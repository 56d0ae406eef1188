"""Tokenised rows as three arrays: a few in memory, or a store on disk that is mapped into memory.

    tokens  int32 [T]     the tokens of all sequences, one after another
    lines   uint8 [B]     what else an example has, as a line of JSON: its row, the tokens of each
                          sequence, the spans that are scored, label, references, names and
                          the hash of its prompt
    ends    int64 [N, 2]  where each of N examples ends in `lines`, and in `tokens`

A store is a folder with a file of each, little-endian, and ``store.json``: their SHA-256 and the
summary of the rows. It is written last, and a store that does not agree with it is built again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainlora.data.examples import Example
from chainlora.data.rows import Rows, RowsSummary
from chainlora.files import sha256

_TYPES = {"tokens": "<i4", "lines": "u1", "ends": "<i8"}
_INDEX = "store.json"

Arrays = Mapping[str, NDArray[Any]]


def flatten(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Return examples as arrays."""
    lines, lengths = [], []
    for each in examples:
        sizes = [len(sequence) for sequence in each.sequences]
        rest = [each.row, sizes, each.scored, each.label, each.references, each.names]
        rest.append(each.prompt_hash)
        lines.append(json.dumps(rest).encode() + b"\n")
        lengths.append((len(lines[-1]), sum(sizes)))
    sequences = chain.from_iterable(each.sequences for each in examples)
    return {
        "tokens": np.fromiter(chain.from_iterable(sequences), _TYPES["tokens"]),
        "lines": np.frombuffer(b"".join(lines), _TYPES["lines"]),
        "ends": np.array(lengths, _TYPES["ends"]).reshape(-1, 2).cumsum(0),
    }


def write_arrays(folder: Path, parts: Iterable[Arrays]) -> tuple[int, int]:
    """Write the arrays of a store, of which `flatten` gives the parts; return examples, tokens."""
    count, last = 0, np.zeros(2, np.int64)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _TYPES}
        for part in parts:
            arrays = {**part, "ends": part["ends"] + last}
            for name, file in files.items():
                file.write(arrays[name].tobytes())
            count += len(arrays["ends"])
            last = arrays["ends"][-1] if len(arrays["ends"]) else last
    return count, int(last[1])


def finish_store(folder: Path, summary: RowsSummary) -> None:
    """Write ``store.json``, which makes the folder a store."""
    index = {"summary": asdict(summary), "sha256": _sums(folder)}
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


class StoredRows(Rows):
    """Rows in the arrays that `flatten` gives of them. Safe to read from several threads."""

    def __init__(self, arrays: Arrays, summary: RowsSummary) -> None:
        self._tokens, self._lines, self._ends = (arrays[name] for name in _TYPES)
        super().__init__(np.diff(self._ends[:, 1], prepend=0).astype(np.int32), summary)

    def example(self, index: int) -> Example:
        line, found = self._parts(index)
        row, sizes, scored, *rest = json.loads(line)
        label, references, names, *hashed = rest  # none in rows kept before it
        tokens = found.tolist()
        bounds = pairwise(accumulate(sizes, initial=0))
        sequences = tuple(tuple(tokens[begin:stop]) for begin, stop in bounds)
        spans = tuple(tuple(map(tuple, each)) for each in scored)
        right = (label, tuple(references), tuple(names))
        return Example(row, sequences, spans, *right, (), *hashed)

    def content(self, index: int) -> bytes:
        line, tokens = self._parts(index)
        said = line.partition(b", ")[2].rpartition(b", ")[0]
        return b"[" + said + b"]" + tokens.tobytes()

    def _parts(self, index: int) -> tuple[bytes, NDArray[np.int32]]:
        """Return the line and the tokens of a row."""
        starts = self._ends[index - 1].tolist() if index else (0, 0)
        (first, start), (last, end) = starts, self._ends[index].tolist()
        return self._lines[first:last].tobytes(), self._tokens[start:end]


def open_store(folder: Path) -> StoredRows | None:
    """Return the rows of a store, or None where there is none or it is damaged."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["sha256"] != _sums(folder):
            return None
        unread = tuple(index["summary"]["unread"])
        return mapped(folder, RowsSummary(**index["summary"] | {"unread": unread}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mapped(folder: Path, summary: RowsSummary) -> StoredRows:
    """Return the rows of a store that was just built or checked."""
    arrays = {n: np.asarray(np.memmap(folder / n, kind, "r")) for n, kind in _TYPES.items()}
    return StoredRows(arrays | {"ends": arrays["ends"].reshape(-1, 2)}, summary)


def _sums(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in _TYPES}
