"""Encode texts: a prompt with its completion or with candidates, or a text alone.

The tokens of a candidate follow MeZO (arXiv 2305.17333): the sequence is ``tokenizer(prompt +
candidate)``, and the candidate is its last ``len(sequence) - len(tokenizer(prompt))`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chainlora.data.encoding.tokens import (
    Draft,
    Ids,
    TokenReader,
    check_start,
    common_prefix,
    refuse_no_tokens,
    with_end,
)
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row
from chainlora.data.tasks import WORD_METRICS, Rendered, Task


class CompletionEncoder:
    """Encodes a prompt and a completion.

    The completion begins at the first token that differs from the prompt's. With `exact`, it begins
    after as many tokens as the prompt has: the rule for candidates, of which only the right one is
    learned (teacher forcing).
    """

    keeps_targets = True

    def __init__(
        self,
        reader: TokenReader,
        render: Callable[[Sequence[Row]], list[Rendered]],
        *,
        fields: Sequence[str] | None = None,
        truncation: str = "error",
        end: Ids,
        exact: bool = False,
        before: str = "",
    ) -> None:
        self.reader, self.render, self.truncation = reader, render, truncation
        self.fields = fields  # the columns of a user's file that are read; None for a task
        self.end, self.exact, self.before = end, exact, before

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        shown = self.render(rows)
        prompts = [self.before + text.prompt for text in shown]
        texts = [prompt + text.completion for prompt, text in zip(prompts, shown, strict=True)]
        prompt_ids, text_ids = self.reader.ids(prompts), self.reader.ids(texts)
        alone = self.reader.ids([text.prompt for text in shown]) if self.before else prompt_ids
        return list(map(self._draft, rows, shown, prompts, prompt_ids, text_ids, alone))

    def _draft(
        self, row: Row, shown: Rendered, prompt: str, prompt_ids: Ids, text_ids: Ids, alone: Ids
    ) -> Draft:
        start = len(prompt_ids) if self.exact else common_prefix(prompt_ids, text_ids)
        ids = with_end(text_ids, self.end)
        if len(text_ids) <= start or len(ids) < 2:
            refuse_no_tokens(shown.completion, prompt, row.origin)
        if prompt or self.exact:
            check_start(start, prompt, shown.completion, row.origin)
        content = list(shown) if self.fields is None else [shown.prompt, shown.completion]
        scored = [[(max(start, 1), len(ids))]]
        draft = Draft(row, content, [ids], scored, references=shown.references, prompt=alone)
        draft.is_joined = self.fields is not None and _is_joined(shown)
        return draft

    def unread(self, row: Row) -> set[str]:
        return set() if self.fields is None else row.keys() - self.fields


def _is_joined(shown: Rendered) -> bool:
    """Return whether nothing separates a prompt and its completion.

    A prompt that ends like a special token (``<|assistant|>``, ``[/INST]``) has a separator.
    """
    end, start = shown.prompt[-1:], shown.completion[:1]
    return bool(end.strip() and start.strip()) and end not in ">]"


def render_rows(rows: Sequence[Row]) -> list[Rendered]:
    """Return the prompt and completion of rows of a user's file."""
    texts = [(text_of(row, "prompt"), text_of(row, "completion")) for row in rows]
    return [Rendered(prompt, (), None, answer, (answer,)) for prompt, answer in texts]


def text_of(row: Row, field: str) -> str:
    """Return a field that must be a text. Raises DataError that names the row."""
    text = row.get(field)
    if not isinstance(text, str):
        if field not in row:
            remedy = f"add it, or name its column by --data.fields '{{{field}: COLUMN}}'"
            raise bad_row(f"`{field}` must be given", f"{', '.join(row)}", row.origin, remedy)
        raise bad_row(f"`{field}` must be a text", f"{text!r:.60}", row.origin)
    return text


class CandidatesEncoder:
    """Encodes rows of a task with candidates: one sequence per candidate, and the right one."""

    keeps_targets = True

    def __init__(self, reader: TokenReader, task: Task, before: str = "") -> None:
        self.reader, self.task, self.before = reader, task, before
        self.truncation: str = task.truncation

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        shown = self.task.render_all(rows)
        prompts = [self.before + text.prompt for text in shown]
        pairs = zip(prompts, shown, strict=True)
        texts = [prompt + candidate for prompt, text in pairs for candidate in text.candidates]
        prompt_ids, text_ids = self.reader.ids(prompts), iter(self.reader.ids(texts))
        sequences = [[next(text_ids) for _ in text.candidates] for text in shown]
        alone = self.reader.ids([text.prompt for text in shown]) if self.before else prompt_ids
        return list(map(self._draft, rows, shown, prompts, prompt_ids, sequences, alone))

    def _draft(
        self,
        row: Row,
        shown: Rendered,
        prompt: str,
        prompt_ids: Ids,
        sequences: list[Ids],
        alone: Ids,
    ) -> Draft:
        start = len(prompt_ids)
        for text, ids in zip(shown.candidates, sequences, strict=True):
            if len(ids) <= start or len(ids) < 2:
                refuse_no_tokens(text, prompt, row.origin)
        check_start(start, prompt, shown.candidates[0], row.origin)
        first_token = self.task.scoring == "first_token"
        if first_token:
            sequences = [ids[: start + 1] for ids in sequences]
        seen: dict[tuple[int, ...], str] = {}
        for text, ids in zip(shown.candidates, sequences, strict=True):
            if tuple(ids) in seen:
                tokens = "first tokens under scoring: first_token" if first_token else "tokens"
                remedy = f"{'use scoring: mean or ' if first_token else ''}choose other words"
                rule, got = f"candidates must have different {tokens}", f"{seen[tuple(ids)]!r} and"
                raise bad_row(rule, f"{got} {text!r}", row.origin, remedy)
            seen[tuple(ids)] = text
        scored = [[(start, len(ids))] for ids in sequences]
        names = shown.names if self.task.candidates or self.task.metric in WORD_METRICS else ()
        right = (shown.label, shown.references, names)
        return Draft(row, list(shown), sequences, scored, *right, prompt=alone)

    def unread(self, row: Row) -> set[str]:
        return set()  # the author of a task chooses the columns


class TextEncoder:
    """Encodes rows of `text`: all tokens are learned; a long text becomes several examples."""

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
                refuse_no_tokens(text, "", row.origin)
            drafts.append(Draft(row, text, [ids], [[(max(first, 1), len(ids))]]))
        return drafts

    def unread(self, row: Row) -> set[str]:
        return row.keys() - {"text"}
