"""One row as tokens: the sequences that a model reads, and the spans that are scored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenised.

    `sequences` holds the full token sequences: one per candidate, or a single one for
    language-model rows. `scored` holds, per sequence, the spans ``[start, end)`` of tokens that are
    targets, ``start >= 1``. `label` is the right candidate. `names` are the values of the
    candidates, which metrics compare with `references`. A pair of preferences is two sequences, the
    chosen one first; `reference` is the mean log-probability per token of each at the start of the
    run. `prompt_hash` is the hash of the prompt, tokenised alone and before cuts, or of the whole
    row if the prompt is empty. Rows with the same prompt share it, whatever their answers.
    `answer_hashes` are the hashes of the prompt before the last answer, which has the earlier turns
    of a dialogue, and of that prompt with the answer, also before cuts. Both are equal for a row
    without a prompt.
    """

    row: int
    sequences: tuple[tuple[int, ...], ...]
    scored: tuple[Spans, ...]
    label: int | None = None
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    reference: tuple[float, ...] = ()
    prompt_hash: int = 0
    answer_hashes: tuple[int, int] = (0, 0)

    def content(self) -> bytes:
        """Return the content as bytes; the row number is not part of it."""
        sizes = [len(sequence) for sequence in self.sequences]
        rest = [sizes, self.scored, self.label, self.references, self.names]
        tokens = np.fromiter(chain.from_iterable(self.sequences), "<i4", sum(sizes))
        return json.dumps(rest).encode() + tokens.tobytes()

    @property
    def num_learned(self) -> int:
        """Count the scored tokens of the right candidate or chosen answer."""
        return sum(end - start for start, end in self.scored[self.label or 0])

    @property
    def right(self) -> Example:
        """Return the row as a completion: only its right candidate or chosen answer."""
        at = self.label or 0
        sequence, spans = self.sequences[at], self.scored[at]
        return replace(self, sequences=(sequence,), scored=(spans,), label=None, names=())

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return the tokens before the last span, which an answer continues."""
        return self.sequences[0][: self.scored[0][-1][0]]


def hash_of(content: bytes) -> int:
    """Return a number in 0…2^63 − 1 that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
