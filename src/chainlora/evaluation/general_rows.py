"""General rows: what a model writes after prompts that the package has (``data/general.json``).

A run keeps them of what it begins on, to measure and to hold what the model could do before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from chainlora.data.encoding.tokens import Ids, TokenReader
from chainlora.data.examples import Example, hash_of
from chainlora.data.kept import Kept
from chainlora.data.rows import MemoryRows
from chainlora.data.splits import Splits
from chainlora.data.templates import ends_of_turn, render_chat
from chainlora.errors import ModelError
from chainlora.evaluation.generation import continue_greedily, greedy_config

logger = logging.getLogger(__name__)

NEW_TOKENS = 64
"""A model writes at most so many, and at most half of what a row can have."""

Prompt = tuple[Ids, bool]
"""Token ids, and whether they are learned: those of plain text are, those of a question not."""


def general_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    column: str,
    progress: Callable[[str, int, int], None],
) -> Kept | None:
    """Return prompts with what the model writes after them, as a run keeps rows.

    A row has at most `longest` tokens; None where no prompt is short enough. Nothing is drawn: the
    same model on the same machine writes the same. `column` is what the rows are called.
    """
    new = min(NEW_TOKENS, longest // 2)
    texts = json.loads(files("chainlora.data").joinpath("general.json").read_text("utf-8"))
    prompts = {split: _prompts(tokenizer, kinds, longest - new) for split, kinds in texts.items()}
    ids = [read for read, _ in chain.from_iterable(prompts.values())]
    if not ids or not new:
        logger.warning("no row of `%s` is kept: its prompts are over %d tokens", column, longest)
        return None
    logger.warning(
        "what the %s writes after %d prompts is kept as rows of `%s` (start_data: none leaves "
        "them out)",
        *("base" if column == "base" else "model", len(ids), column),
    )
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(column, done, len(ids))

    progress(column, 0, len(ids))
    config = greedy_config(model, tokenizer, new, ends_of_turn(tokenizer))
    try:
        written = iter(continue_greedily(model, tokenizer, ids, config, progress=tell))
    except ModelError as error:  # one that can be trained all the same
        logger.warning("no row of `%s` is kept: %s", column, error)
        return None
    rows = {
        split: MemoryRows([_example(n, *each, next(written)) for n, each in enumerate(some)])
        for split, some in prompts.items()
    }
    return Splits(rows["train"], rows["validation"], MemoryRows()).kept()


def _prompts(
    tokenizer: PreTrainedTokenizerBase, kinds: Mapping[str, Sequence[str]], longest: int
) -> list[Prompt]:
    """Return prompts as rows have them. Questions are plain text where there is no chat template
    that renders them."""
    reader = TokenReader(tokenizer)
    asked = [_asked(tokenizer, text) for text in kinds["chat"]]
    if None in asked:
        plain, found = [*kinds["chat"], *kinds["plain"]], []
    else:
        plain, found = [*kinds["plain"]], [(ids, False) for ids in reader.bare(asked)]
    found += [(ids, True) for ids in reader.ids(plain)]
    return [(ids, is_text) for ids, is_text in found if 0 < len(ids) <= longest]


def _asked(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    """Return a question as the chat template renders it, None where that is not possible."""
    messages = [{"role": "user", "content": text}]
    reply = render_chat(tokenizer, {"messages": messages, "add_generation_prompt": True})
    return None if reply.error else reply.value[0]


def _example(row: int, prompt: Ids, is_text: bool, written: Ids) -> Example:
    ids = [*prompt, *written]
    start = 1 if is_text else len(prompt)
    alone = [ids] if is_text else prompt
    hashed = hash_of(json.dumps(alone).encode())
    return Example(row, (tuple(ids),), (((start, len(ids)),),), prompt_hash=hashed)
