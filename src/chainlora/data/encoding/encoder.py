"""Encode rows as examples: choose the encoder, apply the length limit, count the results."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
from chainlora.data.encoding.tokens import Draft, Encoder, Ids, TokenReader
from chainlora.data.encoding.translated import make_translated
from chainlora.data.examples import Example, hash_of
from chainlora.data.readers import bad_row
from chainlora.data.rows import RowsSummary
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
    """Counts of the rows encoded so far."""

    sums: Counter[str] = field(default_factory=Counter)  # by the name in `RowsSummary`
    unread: dict[str, None] = field(default_factory=dict)  # columns, in the order of their rows
    digest: Any = field(default_factory=hashlib.sha256)  # over the SHA-256 of each row
    rows_too_long: int = 0
    longest: int = 0
    first_too_long: tuple[int, str] | None = None  # tokens and place of the first row not cut

    def summary(self) -> RowsSummary:
        """Return the summary that a run reports and keeps."""
        sums: dict[str, Any] = dict(self.sums)
        return RowsSummary(**sums, unread=tuple(self.unread), digest=self.digest.hexdigest())

    def refuse_too_long(self, max_length: int | None) -> None:
        """Raise DataError if rows are too long: names the first one and the longest length.

        With "drop" this is an error only if every row was dropped.
        """
        if self.first_too_long is None:
            return
        (length, place), rows = self.first_too_long, self.sums["rows"]
        if self.sums["rows_dropped"]:
            if self.sums["rows_dropped"] < rows:
                return
            got = f"{rows} longer rows, up to {self.longest} tokens for at most {max_length},"
            remedy = "raise data.max_length, or set data.truncation: cut"
            raise bad_row(
                "at least one row must fit the context", got, f"{place} and after it", remedy
            )
        if self.rows_too_long > 1:
            count = f"{self.rows_too_long} of {rows}"
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
            counts.sums["rows"] += 1
            length = self._length(draft)
            if self.max_length is None or length <= self.max_length:
                fitting.append(draft)
            elif self.truncation in ("cut", "left"):
                counts.sums["rows_cut"] += 1
                counts.sums["tokens_cut"] += length - self.max_length
                fitting.append(self._cut(draft, length, self.max_length))
            elif self.truncation == "split":
                counts.sums["rows_split"] += 1
                fitting += self._split(draft, self.max_length)
            else:
                is_dropped = self.truncation == "drop"
                counts.sums["rows_dropped"] += is_dropped
                counts.rows_too_long += not is_dropped
                counts.longest = max(counts.longest, length)
                counts.first_too_long = counts.first_too_long or (length, draft.row.origin)
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
            raise bad_row(rule, got, draft.row.origin, _OR_DROP)
        scored = [
            [
                (max(begin - excess, first), stop - excess)
                for begin, stop in spans
                if stop - excess > first
            ]
            for spans in draft.scored
        ]
        if not all(scored):
            got = f"only unscored tokens in the last {max_length}"
            raise bad_row("a cut row must keep something to learn", got, draft.row.origin, _OR_DROP)
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


@dataclass(frozen=True)
class RowEncoder:
    """Encodes chunks of rows."""

    encoder: Encoder
    fit: Fit
    refuse: Callable[[Row], None] | None  # None for a task, which defines the columns it reads

    def __call__(self, rows: Sequence[Row], counts: Counts) -> list[Example]:
        """Return the rows as examples, and update the counts. Raises DataError for a bad row."""
        if self.refuse is not None:
            for row in rows:
                self.refuse(row)
        drafts = self.encoder(rows)
        for draft in drafts:  # before cuts, which depend on the length of the answer
            content = json.dumps(draft.content, sort_keys=True, default=str)
            counts.digest.update(hashlib.sha256(content.encode()).digest())
            prompt = draft.prompt if len(draft.prompt) > len(self.fit.front) else draft.sequences
            draft.prompt_hash = hash_of(json.dumps(prompt).encode())
        pairs = [d.sequences for d in drafts if d.label is None and len(d.sequences) == 2]
        counts.sums["pairs_equal"] += sum(chosen == rejected for chosen, rejected in pairs)
        unread = set().union(*map(self.encoder.unread, rows))
        counts.unread |= dict.fromkeys(sorted(map(str, unread)))
        examples = [draft.example() for draft in self.fit(drafts, counts)]
        counts.sums["examples"] += len(examples)
        counts.sums["tokens"] += sum(len(ids) for e in examples for ids in e.sequences)
        return examples


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
