"""Plain text: everything is learnt; what is longer than the context becomes several examples."""

from __future__ import annotations

from collections.abc import Sequence

from chainlora.data.encoding.completion import text_of
from chainlora.data.encoding.drafts import Draft, Ids
from chainlora.data.encoding.tokens import TokenReader, refuse_nothing, with_end
from chainlora.data.sources import Row


class TextEncoder:
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
