"""Rows of texts: a prompt with its completion or with candidates, or a text alone.

A candidate begins where MeZO (arXiv 2305.17333) says: the sequence is ``tokenizer(prompt +
candidate)``, and its candidate are the last ``len(sequence) - len(tokenizer(prompt))`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from chainlora.data.encoding.tokens import (
    Draft,
    Ids,
    TokenReader,
    check_start,
    common_prefix,
    refuse_nothing,
    with_end,
)
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row
from chainlora.data.tasks import WORD_METRICS, Rendered, Task


class Pair(NamedTuple):
    """A prompt and what follows it."""

    prompt: str
    completion: str
    references: tuple[str, ...]
    content: Any


class CompletionEncoder:
    """Rows of a prompt and a completion, which begins at the first token that is not the prompt's.

    With `exact`, it begins after as many tokens as the prompt has: the rule for candidates, under
    which the right one alone is learnt (teacher forcing).
    """

    keeps_targets = True

    def __init__(
        self,
        reader: TokenReader,
        pairs: Callable[[Sequence[Row]], list[Pair]],
        *,
        fields: Sequence[str] | None = None,
        truncation: str = "error",
        end: Ids,
        exact: bool = False,
        before: str = "",
    ) -> None:
        self.reader, self.pairs, self.fields, self.truncation = reader, pairs, fields, truncation
        self.end, self.exact, self.before = end, exact, before

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        pairs = self.pairs(rows)
        prompts = [self.before + pair.prompt for pair in pairs]
        texts = [prompt + pair.completion for prompt, pair in zip(prompts, pairs, strict=True)]
        reads, wholes = self.reader.ids(prompts), self.reader.ids(texts)
        alone = self.reader.ids([pair.prompt for pair in pairs]) if self.before else reads
        return list(map(self._draft, rows, pairs, prompts, reads, wholes, alone))

    def _draft(self, row: Row, pair: Pair, prompt: str, read: Ids, whole: Ids, alone: Ids) -> Draft:
        start = len(read) if self.exact else common_prefix(read, whole)
        ids = with_end(whole, self.end)
        if len(whole) <= start or len(ids) < 2:
            refuse_nothing(pair.completion, prompt, row.origin)
        if prompt or self.exact:
            check_start(start, prompt, pair.completion, row.origin)
        scored = [[(max(start, 1), len(ids))]]
        said = (row.index, row.origin, pair.content, [ids], scored)
        return Draft(*said, references=pair.references, prompt=alone)

    def unread(self, row: Row) -> set[str]:
        return set() if self.fields is None else row.keys() - self.fields


def task_pairs(task: Task, rows: Sequence[Row]) -> list[Pair]:
    """Return the prompt and the right completion of a task's rows."""
    shown = task.render_all(rows)
    return [Pair(each.prompt, each.completion, each.references, list(each)) for each in shown]


def row_pairs(rows: Sequence[Row]) -> list[Pair]:
    """Return the prompt and completion of rows of a user's file."""
    found = [(text_of(row, "prompt"), text_of(row, "completion")) for row in rows]
    return [Pair(*texts, texts[1:], list(texts)) for texts in found]


def text_of(row: Row, field: str) -> str:
    """Return a field that must be a text. Raises DataError that names the row."""
    text = row.get(field)
    if not isinstance(text, str):
        if field not in row:
            remedy = "add it, or name the field that has it by data.fields"
            raise bad_row(f"`{field}` must be given", f"{', '.join(row)}", row.origin, remedy)
        raise bad_row(f"`{field}` must be a text", f"{text!r:.60}", row.origin)
    return text


class CandidatesEncoder:
    """Rows of a task with candidates: one sequence a candidate, and which is right."""

    keeps_targets = True

    def __init__(self, reader: TokenReader, task: Task, before: str = "") -> None:
        self.reader, self.task, self.before = reader, task, before
        self.truncation: str = task.truncation

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        shown = self.task.render_all(rows)
        prompts = [self.before + each.prompt for each in shown]
        pairs = zip(prompts, shown, strict=True)
        texts = [prompt + text for prompt, each in pairs for text in each.candidates]
        reads, wholes = self.reader.ids(prompts), iter(self.reader.ids(texts))
        sequences = [[next(wholes) for _ in each.candidates] for each in shown]
        alone = self.reader.ids([each.prompt for each in shown]) if self.before else reads
        return list(map(self._draft, rows, shown, prompts, reads, sequences, alone))

    def _draft(
        self, row: Row, shown: Rendered, prompt: str, read: Ids, sequences: list[Ids], alone: Ids
    ) -> Draft:
        start = len(read)
        for text, ids in zip(shown.candidates, sequences, strict=True):
            if len(ids) <= start or len(ids) < 2:
                refuse_nothing(text, prompt, row.origin)
        check_start(start, prompt, shown.candidates[0], row.origin)
        first_token = self.task.scoring == "first_token"
        if first_token:
            sequences = [ids[: start + 1] for ids in sequences]
        seen: dict[tuple[int, ...], str] = {}
        for text, ids in zip(shown.candidates, sequences, strict=True):
            if tuple(ids) in seen:
                what = "first tokens under scoring: first_token" if first_token else "tokens"
                remedy = f"{'use scoring: mean or ' if first_token else ''}choose other words"
                rule, got = f"candidates must have different {what}", f"{seen[tuple(ids)]!r} and"
                raise bad_row(rule, f"{got} {text!r}", row.origin, remedy)
            seen[tuple(ids)] = text
        scored = [[(start, len(ids))] for ids in sequences]
        names = shown.names if self.task.candidates or self.task.metric in WORD_METRICS else ()
        said = (row.index, row.origin, list(shown), sequences, scored)
        return Draft(*said, shown.label, shown.references, names, prompt=alone)

    def unread(self, row: Row) -> set[str]:
        return set()  # which columns a task reads is its author's choice


class TextEncoder:
    """Rows of `text`: everything is learnt; a longer one becomes several examples."""

    truncation = "split"
    keeps_targets = False

    def __init__(self, reader: TokenReader, end: Ids) -> None:
        self.reader, self.end = reader, end

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        texts = [text_of(row, "text") for row in rows]
        first = len(self.reader.front)
        drafts = []
        for row, text, read in zip(rows, texts, self.reader.ids(texts), strict=True):
            ids = with_end(read, self.end)
            if len(read) <= first or len(ids) < 2:
                refuse_nothing(text, "", row.origin)
            drafts.append(Draft(row.index, row.origin, text, [ids], [[(max(first, 1), len(ids))]]))
        return drafts

    def unread(self, row: Row) -> set[str]:
        return row.keys() - {"text"}
