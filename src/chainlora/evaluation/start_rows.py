"""Build the entry `start`: rows of the base.

A config names them as `start_data`. Without rows, the model writes general rows: texts after
prompts of the package (``data/general.json``), to measure and to preserve the abilities of the
base. `keep_start_rows` replaces the rows of a run that has begun.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainlora import files
from chainlora.config.schema import DataConfig, RunConfig, StartData
from chainlora.data.division import pick
from chainlora.data.encoding.chat import need_template
from chainlora.data.encoding.tokens import Ids, TokenReader
from chainlora.data.examples import Example, hash_of
from chainlora.data.kept import Kept, read_kept, write_kept
from chainlora.data.rows import MemoryRows
from chainlora.data.splits import Splits, length_limit, prepare_splits
from chainlora.data.templates import ends_of_turn, render_chat, set_chat_template
from chainlora.errors import ChainLoRAError, FileError, ModelError, RunError
from chainlora.evaluation.generation import continue_greedily, greedy_config
from chainlora.evaluation.stage_scores import Progress
from chainlora.models.finding import resolve_model
from chainlora.models.identity import base_files, cache_dir
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import open_run
from chainlora.runs.beginning import save_rows, with_start_rows
from chainlora.runs.changes import whole_run
from chainlora.runs.costs import versions
from chainlora.runs.declaring import config_of
from chainlora.runs.documents import short_digest
from chainlora.runs.draft import drafts_in
from chainlora.runs.entries import BASE, CONTENT, START, TOKENIZER, Due, State, Training, rows_file
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import check_base, noted_base, tokenizer_of
from chainlora.runs.resuming import need_pinned, start_digests
from chainlora.runs.saved_chain import as_adapter

logger = logging.getLogger(__name__)

NEW_TOKENS = 64
"""The most tokens that a model writes for a row; also at most half of a row's length limit."""

Prompt = tuple[Ids, bool]
"""Token ids, and whether they are learned: plain text is, a question is not."""


def rows_of_start(rows: StartData, data: DataConfig, tokenizer: Any, context: int) -> Kept:
    """Return the sample of start rows that a run keeps; `data` is that of its first stage."""
    try:
        return prepare_splits(rows.as_data(data), tokenizer, context).kept()
    except ChainLoRAError as error:
        error.args = (str(error).replace("`data.", "`start_data."),)
        raise


def build_start(run: Path, due: Due, base: OpenBase | None, progress: Progress) -> None:
    """Keep rows for the base: given ones, or general rows."""
    config = _config_of_start(run, read_history(run))
    base = OpenBase.of_config(config, run).or_shared(base)
    for folder in (run / name for name in CONTENT):
        files.remove_scratch(folder, START)  # left by a killed process
    history = read_history(run)
    need_pinned(run, START, due.recipe.own["sources"], start_digests(config))
    chain = base.chain(seed=config.train.seed, hold=config.chain.hold)
    base_facts = noted_base(config, chain, base.files)
    tokenizer = base.tokenizer(run / TOKENIZER if history.tokenizer else None)
    rows: Kept | None = None
    if isinstance(config.start_data, StartData):
        rows = rows_of_start(config.start_data, config.data, tokenizer, base.context)
    else:
        set_chat_template(tokenizer, config.data)
        if config.data.format == "chat":  # the first stage would be refused after the writing
            need_template(tokenizer)
        longest = length_limit(config.data, base.context)
        identity = [base.files, config.train.dtype, config.quantize]
        rows = general_rows(chain.model, tokenizer, longest, progress, identity)
    kept = None if rows is None else save_rows(run, rows, START)
    training = Training(rows=None if rows is None else _digest_of(rows))
    entry = due.entry(State(base=base_facts.fingerprint), kept=kept, training=training)
    update_history(run, lambda now: now.model_copy(update={"base": base_facts}).added(entry, {}))


def _config_of_start(run: Path, history: History) -> RunConfig:
    """Return the config of a run's first stage, with the rows of the base that the run keeps."""
    config = config_of(run, history.plan().stages[0])
    given = (history.general or {}).get("start_data")
    update = {"start_data": None if given is None else StartData.model_validate(given)}
    return config.model_copy(update=update)


def _digest_of(rows: Kept) -> str:
    """Return a digest of the rows to train on, on which combinations depend."""
    return short_digest([[example.sequences, example.scored] for example in rows.train[:]])


def keep_start_rows(run: str | Path, rows: StartData) -> None:
    """Replace the kept rows of a run's start; without new training rows, the old ones stay."""
    run = whole_run(run)
    state = open_run(run)
    if not state.has_run:
        rule = "only a run can keep rows of its start"
        raise RunError(rule, f"a saved chain, {run}", as_adapter(run))
    if begun := drafts_in(run, state.history):
        rule = "Cannot replace the rows of the start while a stage is unfinished"
        got = next(iter(begun.values()))
        raise RunError(rule, got, "finish that stage: repeat the command that began it")
    base = resolve_model(state.base.model)
    check_base(state.base, run, files=base_files(base))  # before rows are read by its tokenizer
    tokenizer, context = tokenizer_of(state, base), context_length(load_skeleton(base))
    sample = rows_of_start(rows, state.with_rows.config().data, tokenizer, context)
    old = state.kept().get(START)
    if old is not None and not sample.train:
        left = ~np.isin(old.prompts, sample.held_out)  # scored rows are left out of all training
        known: Any = {"train": pick(old.train, left), "prompts": old.prompts[left]}
        known |= {"counts": {**sample.counts, "train": old.counts["train"]}}
        sample = replace(sample, seen=old.seen, answers=old.answers, **known)
    kept = save_rows(run, sample, START)
    before = state.history
    after = update_history(run, lambda history: with_start_rows(history, kept))
    named = {entry.kept for entry in after.entries}
    for replaced in {entry.kept for entry in before.entries if entry.kept not in named}:
        files.remove(run / rows_file(str(replaced)))


# --- general rows ---


def general_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    progress: Progress,
    identity: Sequence[Any] | None = None,
) -> Kept | None:
    """Return prompts with the texts that a model writes after them, as kept rows.

    Rows have at most `longest` tokens; the result is None if no prompt is short enough. Decoding is
    greedy, so the same model on the same machine writes the same rows. A model with an `identity`
    writes once: the rows are then in the cache.
    """
    new = min(NEW_TOKENS, longest // 2)
    source = resources.files("chainlora.data").joinpath("general.json")
    texts = json.loads(source.read_text("utf-8"))
    prompts = {split: _prompts(tokenizer, kinds, longest - new) for split, kinds in texts.items()}
    ids = [tokens for of_split in prompts.values() for tokens, _ in of_split]
    if not ids or not new:
        logger.warning("no row of `base` is kept: its prompts are over %d tokens", longest)
        return None
    config = greedy_config(model, tokenizer, new, ends_of_turn(tokenizer))
    parts = [identity, prompts, config.to_dict(), versions(), str(model.device)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    cached = cache_dir() / "general" / key
    kept = _cached(cached) if identity is not None else None
    logger.warning(
        "the base %s texts after %d prompts, which are kept as rows of `base` (start_data: none "
        "leaves them out)",
        *("writes" if kept is None else "wrote", len(ids)),
    )
    if kept is not None:
        return kept
    report = partial(progress, BASE)
    report(0, len(ids))
    try:
        written = continue_greedily(model, tokenizer, ids, config, progress=report)
    except ModelError as error:  # a model that cannot generate can still be trained
        logger.warning("no row of `base` is kept: %s", error)
        return None
    kept = _as_rows(prompts, iter(written))
    if identity is not None:
        with suppress(FileError, OSError):  # without a cache, the next run writes them again
            files.make_folder(cached.parent)
            write_kept(cached, kept)
            cached.replace(_named_by_content(cached, cached))
    return kept


def _named_by_content(path: Path, file: Path) -> Path:
    """Return the name of a file of the cache: its key, then the SHA-256 of its content."""
    return path.with_name(f"{path.name}-{files.sha256(file)}.safetensors")


def _cached(path: Path) -> Kept | None:
    """Return the rows of a key in the cache; None if they are missing or damaged."""
    with suppress(RunError, OSError):
        for file in path.parent.glob(f"{path.name}-*"):
            if file == _named_by_content(path, file):
                return read_kept(file)
    return None


def _as_rows(prompts: Mapping[str, Sequence[Prompt]], written: Iterator[Ids]) -> Kept:
    """Return the prompts of each split with the texts written after them."""
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
    """Return the prompts of at most `longest` tokens: plain texts, and questions of chats."""
    reader = TokenReader(tokenizer)
    chats = [[{"role": "user", "content": text}] for text in kinds["chat"]]
    keys = {"add_generation_prompt": True}
    replies = [render_chat(tokenizer, {"messages": chat} | keys) for chat in chats]
    if any(reply.error for reply in replies):  # without a chat template that can render them
        plain, prompts = [*kinds["chat"], *kinds["plain"]], []
    else:
        questions = reader.bare([reply.value[0] for reply in replies])
        plain, prompts = [*kinds["plain"]], [(ids, False) for ids in questions]
    prompts += [(ids, True) for ids in reader.ids(plain)]
    return [(ids, is_text) for ids, is_text in prompts if 0 < len(ids) <= longest]


def _example(row: int, prompt: Ids, is_text: bool, written: Ids) -> Example:
    """Return a row: all of a plain text is learned, but only the answer to a question."""
    ids = [*prompt, *written]
    start = 1 if is_text else len(prompt)
    identity, answer = [ids] if is_text else prompt, [prompt, written]
    asked, both = (hash_of(json.dumps(each).encode()) for each in (identity, answer))
    hashes: Any = {"prompt_hash": asked, "answer_hashes": (asked, asked if is_text else both)}
    return Example(row, (tuple(ids),), (((start, len(ids)),),), **hashes)
