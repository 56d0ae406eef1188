"""General rows: texts that a model writes after prompts of the package (``data/general.json``).

A run keeps general rows of its origin, to measure and to preserve the abilities of the base.
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
"""The most tokens that a model writes for a row; also at most half of a row's length limit."""

Prompt = tuple[Ids, bool]
"""Token ids, and whether they are learned: plain text is, a question is not."""


def general_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    column: str,
    progress: Callable[[str, int, int], None],
) -> Kept | None:
    """Return prompts with the texts that a model writes after them, as kept rows.

    Rows have at most `longest` tokens; the result is None if no prompt is short enough. Decoding is
    greedy, so the same model on the same machine writes the same rows. `column` is their name.
    """
    new = min(NEW_TOKENS, longest // 2)
    texts = json.loads(files("chainlora.data").joinpath("general.json").read_text("utf-8"))
    prompts = {split: _prompts(tokenizer, kinds, longest - new) for split, kinds in texts.items()}
    ids = [tokens for tokens, _ in chain.from_iterable(prompts.values())]
    if not ids or not new:
        logger.warning("no row of `%s` is kept: its prompts are over %d tokens", column, longest)
        return None
    logger.warning(
        "the %s writes texts after %d prompts, which are kept as rows of `%s` (start_data: none "
        "leaves them out)",
        *("base" if column == "base" else "model", len(ids), column),
    )
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(column, done, len(ids))

    progress(column, 0, len(ids))
    config = greedy_config(model, tokenizer, new, ends_of_turn(tokenizer))
    try:
        written = iter(continue_greedily(model, tokenizer, ids, config, progress=advance))
    except ModelError as error:  # a model that cannot generate can still be trained
        logger.warning("no row of `%s` is kept: %s", column, error)
        return None
    rows = {
        split: MemoryRows(
            [_example(row, *prompt, next(written)) for row, prompt in enumerate(of_split)]
        )
        for split, of_split in prompts.items()
    }
    return Splits(rows["train"], rows["validation"], MemoryRows()).kept()


def _prompts(
    tokenizer: PreTrainedTokenizerBase, kinds: Mapping[str, Sequence[str]], longest: int
) -> list[Prompt]:
    """Return the prompts of at most `longest` tokens.

    Questions are rendered by the chat template; without one that can, they are plain text.
    """
    reader = TokenReader(tokenizer)
    questions = [_rendered(tokenizer, text) for text in kinds["chat"]]
    if None in questions:
        plain, prompts = [*kinds["chat"], *kinds["plain"]], []
    else:
        plain, prompts = [*kinds["plain"]], [(ids, False) for ids in reader.bare(questions)]
    prompts += [(ids, True) for ids in reader.ids(plain)]
    return [(ids, is_text) for ids, is_text in prompts if 0 < len(ids) <= longest]


def _rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    """Return a question rendered by the chat template, None if that is not possible."""
    messages = [{"role": "user", "content": text}]
    reply = render_chat(tokenizer, {"messages": messages, "add_generation_prompt": True})
    return None if reply.error else reply.value[0]


def _example(row: int, prompt: Ids, is_text: bool, written: Ids) -> Example:
    """Return a row: all of a plain text is learned, but only the answer to a question."""
    ids = [*prompt, *written]
    start = 1 if is_text else len(prompt)
    identity = [ids] if is_text else prompt
    hashed = hash_of(json.dumps(identity).encode())
    return Example(row, (tuple(ids),), (((start, len(ids)),),), prompt_hash=hashed)
