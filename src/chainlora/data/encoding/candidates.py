"""Candidates: every answer a row offers after its prompt, and which is right.

A candidate begins where MeZO (arXiv 2305.17333) says: the sequence is ``tokenizer(prompt +
candidate)``, and its candidate are the last ``len(sequence) - len(tokenizer(prompt))`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from chainlora.data.encoding.drafts import Draft, Ids, Span
from chainlora.data.encoding.tokens import TokenReader, check_start, refuse_nothing
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row
from chainlora.data.tasks import WORD_METRICS, Rendered, Task


class CandidatesEncoder:
    """Rows of a task with candidates: one sequence a candidate."""

    keeps_targets = True

    def __init__(self, reader: TokenReader, task: Task, before: str = "") -> None:
        self.reader, self.task, self.before = reader, task, before
        self.truncation: str = task.truncation

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        shown = self.task.render_all(rows)
        prompts = [self.before + each.prompt for each in shown]
        reads = self.reader.ids(prompts)
        pairs = zip(prompts, shown, strict=True)
        texts = [prompt + text for prompt, each in pairs for text in each.candidates]
        wholes = iter(self.reader.ids(texts))
        sequences = [[next(wholes) for _ in each.candidates] for each in shown]
        drafts = list(map(self._draft, rows, shown, prompts, reads, sequences))
        if self.before:
            for draft, ids in zip(drafts, self.reader.ids([s.prompt for s in shown]), strict=True):
                draft.prompt = ids
        return drafts

    def _draft(
        self, row: Row, shown: Rendered, prompt: str, read: Ids, sequences: list[Ids]
    ) -> Draft:
        start = len(read)
        for text, ids in zip(shown.candidates, sequences, strict=True):
            if len(ids) <= start or len(ids) < 2:
                refuse_nothing(text, prompt, row.origin)
        check_start(start, prompt, shown.candidates[0], row.origin)
        first_token = self.task.scoring == "first_token"
        if first_token:
            sequences = [ids[: start + 1] for ids in sequences]
        _check_different(shown.candidates, sequences, row.origin, first_token)
        scored: list[list[Span]] = [[(start, len(ids))] for ids in sequences]
        names = shown.names if self.task.candidates or self.task.metric in WORD_METRICS else ()
        right = (shown.label, shown.references, names)
        return Draft(row.index, row.origin, list(shown), sequences, scored, *right, prompt=read)

    def unread(self, row: Row) -> set[str]:
        """Return nothing: which columns a task reads is its author's choice."""
        return set()


def _check_different(
    texts: Sequence[str], sequences: Sequence[Ids], place: str, first_token: bool
) -> None:
    seen: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(sequences):
        twin = seen.setdefault(tuple(ids), index)
        if twin != index:
            what = "first tokens under scoring: first_token" if first_token else "tokens"
            remedy = f"{'use scoring: mean or ' if first_token else ''}choose other words"
            got = f"{texts[twin]!r} and {texts[index]!r}"
            raise bad_row(f"candidates must have different {what}", got, place, remedy)
