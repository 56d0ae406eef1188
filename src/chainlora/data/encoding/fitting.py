"""What does not fit the context is refused, cut, split or left out, and counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from chainlora.data.encoding.drafts import Draft, Ids, Span
from chainlora.data.readers import bad_row
from chainlora.data.rows import COUNTED
from chainlora.errors import DataError

_SHORTEN = "shorten it or raise data.max_length"
_OR_DROP = f"{_SHORTEN}, or set data.truncation: drop"


class TooLong(NamedTuple):
    """A row that is longer than the context where nothing is cut."""

    tokens: int
    place: str


@dataclass
class Counts:
    """What became of the rows so far; counts of chunks add up."""

    rows: int = 0
    rows_split: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0
    tokens_cut: int = 0
    rows_too_long: int = 0
    longest: int = 0
    first_too_long: TooLong | None = None
    unread: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add the counts of the rows that come next."""
        for name in (*COUNTED, "rows_too_long"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first_too_long = self.first_too_long or other.first_too_long
        self.unread += [name for name in other.unread if name not in self.unread]

    def refuse_too_long(self, max_length: int | None) -> None:
        """Name the first row that is too long, and how far one would have to go for all of them."""
        if self.first_too_long is None:
            return
        length, place = self.first_too_long
        if self.rows_dropped:
            if self.rows_dropped < self.rows:
                return
            got = f"{self.rows} longer ones, up to {self.longest} tokens for at most {max_length},"
            remedy = "raise data.max_length, or set data.truncation: cut"
            raise bad_row("some row must fit the context", got, f"{place} and after it", remedy)
        if self.rows_too_long > 1:
            count = f"{self.rows_too_long} of {self.rows}"
            place += f"; {count} rows are longer, up to {self.longest} tokens"
        got, remedy = (
            f"{length} tokens for at most {max_length}",
            "or set data.truncation: cut or drop",
        )
        raise bad_row("a row must fit the context", got, place, f"{_SHORTEN}, {remedy}")


@dataclass(frozen=True)
class Fit:
    """The rule for rows that are longer than `max_length`."""

    max_length: int | None
    truncation: str  # drop, cut (or left, its earlier name), error or split
    keeps_targets: bool
    front: Ids  # special tokens in front, which stay whatever is cut
    reserve: int = 0  # tokens to keep free after the prompt, for generation
    bos: int | None = None  # stays too, where a chat template writes it and the tokenizer does not

    def __call__(self, drafts: Iterable[Draft], counts: Counts) -> list[Draft]:
        """Return drafts that fit, and count those that did not."""
        fitting: list[Draft] = []
        for draft in drafts:
            counts.rows += 1
            length = self._length(draft)
            if self.max_length is None or length <= self.max_length:
                fitting.append(draft)
            elif self.truncation in ("cut", "left"):
                counts.rows_cut += 1
                counts.tokens_cut += length - self.max_length
                fitting.append(self._cut(draft, length, self.max_length))
            elif self.truncation == "split":
                counts.rows_split += 1
                fitting += self._split(draft, self.max_length)
            else:
                is_dropped = self.truncation == "drop"
                counts.rows_dropped += is_dropped
                counts.rows_too_long += not is_dropped
                counts.longest = max(counts.longest, length)
                counts.first_too_long = counts.first_too_long or TooLong(length, draft.place)
        return fitting

    def _length(self, draft: Draft) -> int:
        """Return the tokens of a row's longest sequence, with room for what is to be generated."""
        longest = max(map(len, draft.sequences))
        if self.keeps_targets:
            return max(longest, draft.scored[0][0][0] + self.reserve)
        return longest

    def _cut(self, draft: Draft, length: int, max_length: int) -> Draft:
        """Cut the oldest tokens after the special ones, the same number in every sequence."""
        excess, front = length - max_length, len(self.front)
        if draft.sequences[0][:front] != self.front:  # a chat template may write none
            front = 0
        front = front or int(draft.sequences[0][0] == self.bos)
        first = max(front, 1)
        room = min(spans[0][0] for spans in draft.scored) - first
        if self.keeps_targets and excess > room:
            rule = "what is scored must fit the context beside one token of prompt"
            got = f"{length - room} tokens for at most {max_length}"
            raise bad_row(rule, got, draft.place, _OR_DROP)
        scored = [_move(spans, excess, first) for spans in draft.scored]
        if not all(scored):
            got = f"only unscored tokens in the last {max_length}"
            raise bad_row("a cut row must keep something to learn", got, draft.place, _OR_DROP)
        sequences = [ids[:front] + ids[front + excess :] for ids in draft.sequences]
        return replace(draft, sequences=sequences, scored=scored)

    def _split(self, draft: Draft, max_length: int) -> list[Draft]:
        """Cut a text into blocks in which every token is a target once.

        Each block but the first begins with the special tokens in front and the last token of the
        block before, from which its own first token is predicted.
        """
        (ids,), front = draft.sequences, len(self.front)
        step = max_length - front - 1
        if step < 1:
            rule = f"a block of text must hold two tokens beside the {front} special ones"
            raise DataError(rule, f"max_length {max_length}", "raise data.max_length")
        first = [[(max(front, 1), max_length)]]
        blocks = [replace(draft, sequences=[ids[:max_length]], scored=first)]
        for start in range(max_length, len(ids), step):
            block = ids[:front] + ids[start - 1 : start + step]
            blocks.append(replace(draft, sequences=[block], scored=[[(front + 1, len(block))]]))
        return blocks


def _move(spans: list[Span], excess: int, first: int) -> list[Span]:
    kept = [(begin - excess, stop - excess) for begin, stop in spans if stop - excess > first]
    return [(max(begin, first), stop) for begin, stop in kept]
