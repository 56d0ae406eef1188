"""Completions: one right text after a prompt, of a task or of rows of prompt + completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from chainlora.data.encoding.drafts import Draft, Ids
from chainlora.data.encoding.tokens import (
    TokenReader,
    check_start,
    common_prefix,
    refuse_nothing,
    with_end,
)
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row
from chainlora.data.tasks import Task


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
        drafts = list(map(self._draft, rows, pairs, prompts, reads, wholes))
        if self.before:
            for draft, ids in zip(drafts, self.reader.ids([p.prompt for p in pairs]), strict=True):
                draft.prompt = ids
        return drafts

    def _draft(self, row: Row, pair: Pair, prompt: str, read: Ids, whole: Ids) -> Draft:
        start = len(read) if self.exact else common_prefix(read, whole)
        ids = with_end(whole, self.end)
        if len(whole) <= start or len(ids) < 2:
            refuse_nothing(pair.completion, prompt, row.origin)
        if prompt or self.exact:
            check_start(start, prompt, pair.completion, row.origin)
        span = (max(start, 1), len(ids))
        said = (row.index, row.origin, pair.content, [ids], [[span]])
        return Draft(*said, references=pair.references, prompt=read)

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
