"""From rows to examples: the encoder of a task or format, its limits, and what it counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from chainlora.config.schema import PAIR_LOSSES
from chainlora.data.encoding import translated
from chainlora.data.encoding.candidates import CandidatesEncoder
from chainlora.data.encoding.chat import ChatEncoder
from chainlora.data.encoding.completion import CompletionEncoder, row_pairs, task_pairs
from chainlora.data.encoding.drafts import Draft, Encoder
from chainlora.data.encoding.fitting import Counts, Fit
from chainlora.data.encoding.preference_rows import (
    PairEncoder,
    detect_pairs,
    refuse_plain,
    refuse_preferences,
)
from chainlora.data.encoding.text import TextEncoder
from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.encoding.translated import make_translated
from chainlora.data.examples import Example, hash_of
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row, where
from chainlora.data.tasks import Task

FORMATS = {"completion": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
"""What a row of our own must have, by format."""


@dataclass(frozen=True)
class Options:
    """How rows are encoded, beyond what task, format and tokenizer say.

    Attributes:
        max_length: most tokens in a sequence; None is no limit.
        truncation: "cut" (or "left", its earlier name) removes the oldest tokens of the prompt, by
            the same number for all candidates of a row and never the candidate; "drop" leaves the
            row out; "error" refuses it. None is the task's own; for formats "error", and for plain
            text the splitting into blocks.
        objective: "completion" gives the right candidate alone (teacher forcing), that of a pair
            its two answers. Any other, and None, gives every candidate where the task has some.
        reserve: tokens to keep free after the prompt (for generation).
        before: text in front of every prompt, such as `Task.demonstrations`.
    """

    max_length: int | None = None
    truncation: Literal["drop", "cut", "error", "left"] | None = None
    objective: str | None = None
    reserve: int = 0
    before: str = ""


class Encoded(NamedTuple):
    """Some rows as examples, what was counted, and the SHA-256 of each row, one after another."""

    examples: list[Example]
    counts: Counts
    digests: bytes


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows, in chunks and in any process."""

    encoder: Encoder
    fit: Fit
    refuse: Callable[[Row], None] | None  # None: a task says itself which columns it reads

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """Return the rows as examples. Raises DataError that names a row that cannot be used."""
        if self.refuse is not None:
            for row in rows:
                self.refuse(row)
        drafts = self.encoder(rows)
        digests = b"".join(map(_digest, drafts))
        for draft in drafts:  # before a cut, whose length is that of the answer too
            prompt = draft.prompt if len(draft.prompt) > len(self.fit.front) else draft.sequences
            draft.prompt_hash = hash_of(json.dumps(prompt).encode())
        unread = set().union(*map(self.encoder.unread, rows))
        counts = Counts(unread=sorted(map(str, unread)))
        examples = [draft.example() for draft in self.fit(drafts, counts)]
        return Encoded(examples, counts, digests)


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
    """Return how rows of a task or format are read: the one place that knows every encoder."""
    if isinstance(task, Task):
        return _task_encoder(task, reader, options)
    if options.objective in PAIR_LOSSES:
        plain = replace(options, objective=None)
        answer = "conversational" if task == "sharegpt" else task
        return PairEncoder(task, make_encoder(answer, reader, plain))
    if task in translated.FIELDS:
        return make_translated(task, reader)
    if task == "completion":
        return CompletionEncoder(reader, row_pairs, fields=FORMATS[task], end=reader.end())
    return ChatEncoder(reader) if task == "chat" else TextEncoder(reader, reader.end())


def _task_encoder(task: Task, reader: TokenReader, options: Options) -> Encoder:
    if options.objective != "completion" and task.completion is None:
        return CandidatesEncoder(reader, task, options.before)
    return CompletionEncoder(
        reader,
        partial(task_pairs, task),
        truncation=task.truncation,
        end=reader.end() if task.add_eos else [],
        exact=task.completion is None,
        before=options.before,
    )


def detect_format(rows: Sequence[Mapping[str, Any]], objective: str | None = None) -> str:
    """Return the format whose fields the first row has. Raises DataError that names its fields."""
    if objective in PAIR_LOSSES:
        return detect_pairs(rows[0])
    refuse_preferences(rows[0])
    if (found := translated.detect_translated(rows[0])) is not None:
        return found
    for name, fields in FORMATS.items():
        if all(field in rows[0] for field in fields):
            return name
    every = [*FORMATS.items(), *translated.FIELDS.items()]
    known = "; ".join(f"{' + '.join(fields)} ({name})" for name, fields in every)
    rule, got = f"rows must have the fields of a format: {known}", ", ".join(map(str, rows[0]))
    raise bad_row(
        rule, got, where(rows[0]), "name them by data.fields, or describe them in a task file"
    )


def _digest(draft: Draft) -> bytes:
    content = json.dumps(draft.content, sort_keys=True, default=str)  # ASCII: any text encodes
    return hashlib.sha256(content.encode()).digest()
