"""Encode rows as examples: choose the encoder, apply the length limit, count the results."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from chainlora.config.data import FIELDS_KEY
from chainlora.config.schema import PAIR_LOSSES
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
from chainlora.data.encoding.tokens import Draft, Encoder, TokenReader, common_prefix
from chainlora.data.encoding.translated import FIELDS as TRANSLATED
from chainlora.data.encoding.translated import make_translated
from chainlora.data.examples import Example, hash_of
from chainlora.data.readers import bad_row
from chainlora.data.rows import RowsSummary
from chainlora.data.sources import Row, Source, where
from chainlora.data.tasks import Task
from chainlora.errors import DataError

FORMATS: dict[str, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "question": ("question", "answer"),
}
"""The fields that a row must have, by format of chainlora."""
USUAL_COLUMNS = (("input", "target"), ("text", "label"))
"""Columns of texts that `auto` reads as question and answer, if a row has no format's fields."""
_OR = "shorten it or raise data.max_length, or set data.truncation"


@dataclass(frozen=True)
class Options:
    """How rows are encoded, in addition to task, format and tokenizer."""

    max_length: int | None = None  # the most tokens of a sequence; None is no limit
    # "cut" (or "left", its earlier name) removes the oldest tokens of the prompt, the same number
    # for all candidates of a row, and never tokens of a candidate. "drop" leaves the row out.
    # "error" refuses it. None is the task's value; without a task it is "error", and plain text is
    # split into blocks.
    truncation: Literal["drop", "cut", "error", "left"] | None = None
    # "completion" encodes only the right candidate (teacher forcing). A loss of pairs encodes both
    # answers. Other values and None encode every candidate, if the task has candidates.
    objective: str | None = None
    reserve: int = 0  # tokens to keep free after the prompt (for generation)
    before: str = ""  # text in front of every prompt, such as `Task.demonstrations`


class RowEncoder:
    """Encodes the rows of a task, or of a format of `data.format`, in chunks, and counts them."""

    def __init__(
        self, task: Task | str, tokenizer: PreTrainedTokenizerBase, options: Options
    ) -> None:
        reader = TokenReader(tokenizer)
        self.encoder = make_encoder(task, reader, options)
        self.max_length, self.reserve = options.max_length, options.reserve
        self.truncation = options.truncation or self.encoder.truncation
        self.front = reader.front  # special tokens in front, which are never cut
        self.bos = tokenizer.bos_token_id  # nor is this one: a chat template can write it in front
        self.refuse = refuse_plain if options.objective in PAIR_LOSSES else refuse_preferences
        self.has_own_columns = isinstance(task, Task)
        self.sums = Counter[str]()  # by the name in `RowsSummary`
        self.unread: dict[str, None] = {}  # columns, in the order of their rows
        self.digest = hashlib.sha256()  # over the SHA-256 of each row
        self.rows_too_long = self.longest = 0
        self.first_too_long: tuple[int, str] | None = None  # tokens and place of the first

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        """Return rows as examples. Raises DataError that names a row that cannot be used."""
        for row in () if self.has_own_columns else rows:
            self.refuse(row)
        drafts = self.encoder(rows)
        for draft in drafts:  # before cuts, which depend on the length of the answer
            content = json.dumps(draft.content, sort_keys=True, default=str)
            self.digest.update(hashlib.sha256(content.encode()).digest())
            prompt = draft.prompt if len(draft.prompt) > len(self.front) else draft.sequences
            draft.prompt_hash = hash_of(json.dumps(prompt).encode())
            draft.answer_hashes = self._answer_hashes(draft)
        pairs = [d.sequences for d in drafts if d.label is None and len(d.sequences) == 2]
        self.sums["pairs_equal"] += sum(chosen == rejected for chosen, rejected in pairs)
        unread = set().union(*map(self.encoder.unread, rows))
        self.unread |= dict.fromkeys(sorted(map(str, unread)))
        examples = [fitting.example() for draft in drafts for fitting in self._fitted(draft)]
        self.sums["rows"] += len(drafts)
        self.sums["examples"] += len(examples)
        self.sums["rows_joined"] += sum(d.is_joined and len(d.sequences) == 1 for d in drafts)
        self.sums["tokens"] += sum(len(ids) for e in examples for ids in e.sequences)
        return examples

    def _answer_hashes(self, draft: Draft) -> tuple[int, int]:
        """Return `Example.answer_hashes`: neither hash depends on cuts or demonstrations."""
        sequence = [*draft.sequences[draft.label or 0]]
        asked = draft.prompt if draft.asked is None else draft.asked
        if len(asked) <= len(self.front):
            whole = hash_of(json.dumps(sequence).encode())
            return whole, whole
        start, end = draft.scored[draft.label or 0][-1]
        # a pair is scored from the first token in which its answers differ from the prompt
        answer = sequence[max(start, common_prefix(asked, sequence)) : end]
        both = hash_of(json.dumps([asked, answer]).encode())
        return hash_of(json.dumps(asked).encode()), both

    def summary(self) -> RowsSummary:
        """Return the summary after the last row.

        Raises DataError if rows are too long: names the first one and the longest length. With
        "drop" this is an error only if every row was dropped.
        """
        if self.first_too_long is not None:
            self._refuse_too_long(*self.first_too_long)
        sums: dict[str, Any] = dict(self.sums)
        return RowsSummary(**sums, unread=tuple(self.unread), digest=self.digest.hexdigest())

    def _refuse_too_long(self, length: int, place: str) -> None:
        rows, most = self.sums["rows"], self.max_length
        if self.sums["rows_dropped"]:
            if self.sums["rows_dropped"] < rows:
                return
            rule, place = "at least one row must fit the context", f"{place} and after it"
            got = f"{rows} longer rows, up to {self.longest} tokens for at most {most},"
            raise bad_row(rule, got, place, "raise data.max_length, or set data.truncation: cut")
        if self.rows_too_long > 1:
            count = f"{self.rows_too_long} of {rows}"
            place += f"; {count} rows are too long, up to {self.longest} tokens"
        got, remedy = f"{length} tokens for at most {most}", f"{_OR}: cut or drop"
        raise bad_row("a row must fit the context", got, place, remedy)

    def _fitted(self, draft: Draft) -> list[Draft]:
        """Return a row that fits, cut or split, or nothing of a row that is too long."""
        length, most = max(map(len, draft.sequences)), self.max_length
        if self.encoder.keeps_targets:
            length = max(length, draft.scored[0][0][0] + self.reserve)
        if most is None or length <= most:
            return [draft]
        if self.truncation in ("cut", "left"):
            self.sums["rows_cut"] += 1
            self.sums["tokens_cut"] += length - most
            return [self._cut(draft, length, most)]
        if self.truncation == "split":
            self.sums["rows_split"] += 1
            return self._split(draft, most)
        is_dropped = self.truncation == "drop"
        self.sums["rows_dropped"] += is_dropped
        self.rows_too_long += not is_dropped
        self.longest = max(self.longest, length)
        self.first_too_long = self.first_too_long or (length, draft.row.origin)
        return []

    def _cut(self, draft: Draft, length: int, max_length: int) -> Draft:
        """Cut the oldest tokens after the special ones, the same number in every sequence."""
        excess, front = length - max_length, len(self.front)
        if draft.sequences[0][:front] != self.front:  # a chat template can omit them
            front = 0
        front = front or int(draft.sequences[0][0] == self.bos)
        first = max(front, 1)
        room = min(spans[0][0] for spans in draft.scored) - front - 1
        if self.encoder.keeps_targets and excess > room:
            rule = "the scored tokens must fit the context with one token of the prompt"
            got = f"{length - max(room, 0)} tokens for at most {max_length}"
            raise bad_row(rule, got, draft.row.origin, f"{_OR}: drop")
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
            raise bad_row(
                "a cut row must keep something to learn", got, draft.row.origin, f"{_OR}: drop"
            )
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
    if task in TRANSLATED or task == "question":
        return make_translated(task, reader)
    if task == "completion":
        return CompletionEncoder(reader, render_rows, fields=FORMATS[task], end=reader.end())
    return ChatEncoder(reader) if task == "chat" else TextEncoder(reader, reader.end())


def detect_format(rows: Sequence[Mapping[str, Any]], objective: str | None = None) -> str:
    """Return the format whose fields the first row has. Raises DataError if there is none."""
    row = rows[0]
    if objective in PAIR_LOSSES:
        return detect_pairs(row)
    refuse_preferences(row)
    for name, fields in (TRANSLATED | FORMATS).items():
        kind = list if name in ("conversational", "sharegpt") else object
        if all(field in row and isinstance(row[field], kind) for field in fields):
            return name
    formats = [(fields, name) for name, fields in (FORMATS | TRANSLATED).items()]
    formats += [(columns, "question") for columns in USUAL_COLUMNS]
    known = "; ".join(f"{' + '.join(fields)} ({name})" for fields, name in formats)
    rule, got = f"rows must have the fields of a format: {known}", ", ".join(map(str, row))
    remedy = f"name them by {FIELDS_KEY}, or describe them in a task file"
    raise bad_row(rule, got, where(row), remedy)


def with_usual_columns(source: Source, objective: str | None) -> Source:
    """Return a source whose usual columns, if its first row has some, are question and answer.

    The fields of a format come before usual columns; only a `text` with a text as `label` is a
    question. `data.fields` and losses of pairs turn this off.
    """
    if source.fields or objective in PAIR_LOSSES:
        return source
    row = next(iter(source))
    formats = [fields for fields in (TRANSLATED | FORMATS).values() if row.keys() >= {*fields}]
    pairs = USUAL_COLUMNS if not formats else USUAL_COLUMNS[1:] if formats == [("text",)] else ()
    for columns in pairs:
        if all(isinstance(row.get(column), str) for column in columns):
            named = dict(zip(FORMATS["question"], columns, strict=True))
            return replace(source, fields=named)
    return source
