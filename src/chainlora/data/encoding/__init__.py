"""Rows to tokens: what is read, what is a target, what is cut or split.

Rows are those of a task (`chainlora.data.tasks`) or of a user's own file in one of three formats:

    completion   {"prompt": …, "completion": …}              loss on the completion
    chat         {"messages": [{"role": …, "content": …}]}   the model's own chat template, loss on
                                                             the assistant; `tools` beside it
    text         {"text": …}                                 loss on everything

Everything is checked here, before training starts, and a row that cannot be used is named by file
and line. One file an objective:

    candidates.py · completion.py · chat.py · text.py   rows to drafts with tokens and targets
    translated.py  rows of ShareGPT, Alpaca and TRL's conversations, as one of these formats
    tokens.py      texts to ids      fitting.py   what is longer than the context
    encoder.py     picks the encoder of a task or format, and puts them together
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from chainlora.data.encoding.encoder import (
    FORMATS,
    Encoded,
    Options,
    RowEncoder,
    detect_format,
    make_row_encoder,
)
from chainlora.data.examples import Example
from chainlora.data.sources import Row
from chainlora.data.tasks import Task
from chainlora.errors import DataError

__all__ = [
    "FORMATS",
    "Encoded",
    "Options",
    "RowEncoder",
    "detect_format",
    "encode_examples",
    "make_row_encoder",
]


def encode_examples(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    *,
    max_length: int | None = None,
    truncation: Literal["error", "left"] | None = None,
    add_eos: bool | None = None,
    objective: Literal["candidates", "completion"] | None = None,
    reserve: int = 0,
    before: str = "",
) -> list[Example]:
    """Tokenise rows that are in memory; `chainlora.data.preparing.make_rows` takes any number.

    Args:
        rows: as `load_rows` or `tasks.load_split` give them, or plain dicts.
        tokenizer: of the model; special tokens it adds in front stay in front, whatever is cut.
        task: a task, or a format as `data.format` names it.
        max_length, truncation, add_eos, objective, reserve, before: as in `Options`.

    Raises:
        DataError: no rows; a row that cannot be rendered, tokenises to nothing, or is too long
            (file, line, length, limit and remedy are named).
        ConfigError: unknown format.
    """
    if not rows:
        raise DataError("data must hold at least one row (got none); check the file or the split")
    options = Options(max_length, truncation, add_eos, objective, reserve, before)
    kind = detect_format(rows) if task == "auto" else task
    named = [
        row if isinstance(row, Row) else Row(row, position, f"row {position}")
        for position, row in enumerate(rows)
    ]
    encoded = make_row_encoder(kind, tokenizer, options)(named)
    encoded.counts.refuse_too_long(max_length)
    return encoded.examples
