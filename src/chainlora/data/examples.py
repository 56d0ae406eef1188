"""One row as tokens: what is read and what is scored."""

from __future__ import annotations

from dataclasses import dataclass

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenised.

    `sequences` holds the full token sequences: one per candidate, or a single one for
    language-model rows. `scored` holds, per sequence, the spans ``[start, end)`` of tokens that are
    targets, ``start >= 1``. Candidates may stand for `names`, which metrics compare with
    `references`. A pair of preferences is two sequences, the chosen one first; `reference` is the
    mean log-probability per token of each at the start of the run.
    """

    row: int
    sequences: tuple[tuple[int, ...], ...]
    scored: tuple[Spans, ...]
    label: int | None = None
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    reference: tuple[float, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the last span: what an answer is written after."""
        return self.sequences[0][: self.scored[0][-1][0]]
