"""Encode rows as examples: choose the encoder, apply the length limit, count the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from chainlora.config.schema import PAIR_LOSSES
from chainlora.data.encoding import translated
from chainlora.data.encoding.chat import ChatEncoder
from chainlora.data.encoding.preference_rows import (
    PairEncoder,
    detect_pairs,
    refuse_plain,
    refuse_preferences,
)
from chainlora.data.encoding.texts import (
    CandidatesEncoder,
    CompletionEncoder,
    TextEncoder,
    render_rows,
)
from chainlora.data.encoding.tokens import Draft, Encoder, Ids, Span, TokenReader
from chainlora.data.encoding.translated import make_translated
from chainlora.data.examples import Example, hash_of
from chainlora.data.readers import bad_row
from chainlora.data.rows import SUMMED, RowsSummary
from chainlora.data.sources import Row, where
from chainlora.data.tasks import Task
from chainlora.errors import DataError

FORMATS = {"completion": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
"""The fields that a row must have, by format of chainlora."""
_SHORTEN = "shorten it or raise data.max_length"
_OR_DROP = f"{_SHORTEN}, or set data.truncation: drop"


@dataclass(frozen=True)
class Options:
    """How rows are encoded, in addition to task, format and tokenizer.

    Attributes:
        max_length: the most tokens of a sequence; None is no limit.
        truncation: "cut" (or "left", its earlier name) removes the oldest tokens of the prompt, the
            same number for all candidates of a row, and never tokens of a candidate. "drop" leaves
            the row out. "error" refuses it. None is the task's value; without a task it is "error",
            and plain text is split into blocks.
        objective: "completion" encodes only the right candidate (teacher forcing). A loss of pairs
            encodes both answers. Other values and None encode every candidate, if the task has
            candidates.
        reserve: tokens to keep free after the prompt (for generation).
        before: text in front of every prompt, such as `Task.demonstrations`.
    """

    max_length: int | None = None
    truncation: Literal["drop", "cut", "error", "left"] | None = None
    objective: str | None = None
    reserve: int = 0
    before: str = ""


@dataclass
class Counts:
    """Counts of the rows encoded so far; counts of chunks add up."""

    examples: int = 0
    tokens: int = 0
    rows: int = 0
    rows_split: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0
    tokens_cut: int = 0
    pairs_equal: int = 0
    rows_too_long: int = 0
    longest: int = 0
    first_too_long: tuple[int, str] | None = None  # tokens and place of the first row not cut
    unread: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        for name in (*SUMMED, "rows_too_long"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first_too_long = self.first_too_long or other.first_too_long
        self.unread += [name for name in other.unread if name not in self.unread]

    def summary(self, digest: str) -> RowsSummary:
        """Return the summary that a run reports and keeps."""
        sums = {name: getattr(self, name) for name in SUMMED}
        return RowsSummary(**sums, unread=tuple(self.unread), digest=digest)

    def refuse_too_long(self, max_length: int | None) -> None:
        """Raise DataError if rows are too long: names the first one and the longest length.

        With "drop" this is an error only if every row was dropped.
        """
        if self.first_too_long is None:
            return
        length, place = self.first_too_long
        if self.rows_dropped:
            if self.rows_dropped < self.rows:
                return
            got = f"{self.rows} longer rows, up to {self.longest} tokens for at most {max_length},"
            remedy = "raise data.max_length, or set data.truncation: cut"
            raise bad_row(
                "at least one row must fit the context", got, f"{place} and after it", remedy
            )
        if self.rows_too_long > 1:
            count = f"{self.rows_too_long} of {self.rows}"
            place += f"; {count} rows are too long, up to {self.longest} tokens"
        got = f"{length} tokens for at most {max_length}"
        remedy = f"{_SHORTEN}, or set data.truncation: cut or drop"
        raise bad_row("a row must fit the context", got, place, remedy)


@dataclass(frozen=True)
class Fit:
    """The rule for rows that are longer than `max_length`."""

    max_length: int | None
    truncation: str  # drop, cut (or left, its earlier name), error or split
    keeps_targets: bool
    front: Ids  # special tokens in front, which are never cut
    reserve: int = 0  # tokens to keep free after the prompt, for generation
    bos: int | None = None  # is not cut either; a chat template can write it in front

    def __call__(self, drafts: Iterable[Draft], counts: Counts) -> list[Draft]:
        """Return the drafts that fit, cut or split, and update the counts."""
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
                counts.first_too_long = counts.first_too_long or (length, draft.place)
        return fitting

    def _length(self, draft: Draft) -> int:
        """Return the tokens of a row's longest sequence, or of its prompt with `reserve`."""
        longest = max(map(len, draft.sequences))
        if self.keeps_targets:
            return max(longest, draft.scored[0][0][0] + self.reserve)
        return longest

    def _cut(self, draft: Draft, length: int, max_length: int) -> Draft:
        """Cut the oldest tokens after the special ones, the same number in every sequence."""
        excess, front = length - max_length, len(self.front)
        if draft.sequences[0][:front] != self.front:  # a chat template can omit them
            front = 0
        front = front or int(draft.sequences[0][0] == self.bos)
        first = max(front, 1)
        room = min(spans[0][0] for spans in draft.scored) - first
        if self.keeps_targets and excess > room:
            rule = "the scored tokens must fit the context with one token of the prompt"
            got = f"{length - room} tokens for at most {max_length}"
            raise bad_row(rule, got, draft.place, _OR_DROP)
        scored = [_move(spans, excess, first) for spans in draft.scored]
        if not all(scored):
            got = f"only unscored tokens in the last {max_length}"
            raise bad_row("a cut row must keep something to learn", got, draft.place, _OR_DROP)
        sequences = [ids[:front] + ids[front + excess :] for ids in draft.sequences]
        return replace(draft, sequences=sequences, scored=scored)

    def _split(self, draft: Draft, max_length: int) -> list[Draft]:
        """Split a text into blocks; every token is a target exactly once.

        Each block but the first begins with the special tokens and the last token of the previous
        block, which predicts the first new token.
        """
        (ids,), front = draft.sequences, len(self.front)
        step = max_length - front - 1
        if step < 1:
            rule = f"a block of text must hold two tokens and the {front} special tokens"
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


class Encoded(NamedTuple):
    """A chunk of rows as examples, their counts, and the SHA-256 of each row, concatenated."""

    examples: list[Example]
    counts: Counts
    digests: bytes


@dataclass(frozen=True)
class RowEncoder:
    """Encodes chunks of rows."""

    encoder: Encoder
    fit: Fit
    refuse: Callable[[Row], None] | None  # None for a task, which defines the columns it reads

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """Return the rows as examples. Raises DataError that names a row that cannot be used."""
        if self.refuse is not None:
            for row in rows:
                self.refuse(row)
        drafts = self.encoder(rows)
        texts = [json.dumps(draft.content, sort_keys=True, default=str) for draft in drafts]
        digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
        for draft in drafts:  # before cuts, which depend on the length of the answer
            prompt = draft.prompt if len(draft.prompt) > len(self.fit.front) else draft.sequences
            draft.prompt_hash = hash_of(json.dumps(prompt).encode())
        unread = set().union(*map(self.encoder.unread, rows))
        counts = Counts(unread=sorted(map(str, unread)))
        counts.pairs_equal = sum(map(_is_equal_pair, drafts))
        examples = [draft.example() for draft in self.fit(drafts, counts)]
        counts.examples = len(examples)
        counts.tokens = sum(len(ids) for example in examples for ids in example.sequences)
        return Encoded(examples, counts, digests)


def _is_equal_pair(draft: Draft) -> bool:
    """Return whether a row is a pair of preferences with equal answers."""
    is_pair = draft.label is None and len(draft.sequences) == 2
    return is_pair and draft.sequences[0] == draft.sequences[1]


def make_row_encoder(
    task: Task | str, tokenizer: PreTrainedTokenizerBase, options: Options
) -> RowEncoder:
    """Return the encoder of a task, or of a format of `data.format`."""
    reader = TokenReader(tokenizer)
    encoder = make_encoder(task, reader, options)
    fit = Fit(
        options.max_length,
        options.truncation or encoder.truncation,
        encoder.keeps_targets,
        reader.front,
        options.reserve,
        tokenizer.bos_token_id,
    )
    refuse = refuse_plain if options.objective in PAIR_LOSSES else refuse_preferences
    return RowEncoder(encoder, fit, None if isinstance(task, Task) else refuse)


def make_encoder(task: Task | str, reader: TokenReader, options: Options) -> Encoder:
    """Return the encoder of a task or format. Every encoder is listed here."""
    if isinstance(task, Task):
        if options.objective != "completion" and task.completion is None:
            return CandidatesEncoder(reader, task, options.before)
        return CompletionEncoder(
            reader,
            task.render_all,
            truncation=task.truncation,
            end=reader.end() if task.add_eos else [],
            exact=task.completion is None,
            before=options.before,
        )
    if options.objective in PAIR_LOSSES:
        plain = replace(options, objective=None)
        answer = "conversational" if task == "sharegpt" else task
        return PairEncoder(task, make_encoder(answer, reader, plain))
    if task in translated.FIELDS:
        return make_translated(task, reader)
    if task == "completion":
        return CompletionEncoder(reader, render_rows, fields=FORMATS[task], end=reader.end())
    return ChatEncoder(reader) if task == "chat" else TextEncoder(reader, reader.end())


def detect_format(rows: Sequence[Mapping[str, Any]], objective: str | None = None) -> str:
    """Return the format whose fields the first row has. Raises DataError if there is none."""
    if objective in PAIR_LOSSES:
        return detect_pairs(rows[0])
    refuse_preferences(rows[0])
    if (translated_format := translated.detect_translated(rows[0])) is not None:
        return translated_format
    for name, fields in FORMATS.items():
        if all(field in rows[0] for field in fields):
            return name
    formats = [*FORMATS.items(), *translated.FIELDS.items()]
    known = "; ".join(f"{' + '.join(fields)} ({name})" for name, fields in formats)
    rule, got = f"rows must have the fields of a format: {known}", ", ".join(map(str, rows[0]))
    raise bad_row(
        rule, got, where(rows[0]), "name them by data.fields, or describe them in a task file"
    )
