"""Import adapters that were trained elsewhere, as entries beside the stages of a run.

Such an entry has links, kept rows and a config, like a stage, but no records and no result. Its
config names the adapter as `start` and its rows as `data`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from chainlora import files
from chainlora.chain.adapters import check_targets
from chainlora.chain.adapters.adapter_files import MERGE
from chainlora.chain.checks import check_link
from chainlora.config.reading import dump_config
from chainlora.config.schema import RunConfig
from chainlora.data.kept import Kept
from chainlora.data.splits import Splits, prepare_splits
from chainlora.errors import ChainLoRAError, DataError, ModelError, RunError
from chainlora.models.loading import load_tokenizer
from chainlora.runs.beginning import save_rows
from chainlora.runs.declaring import config_of
from chainlora.runs.entries import CONFIG, TOKENIZER, Base, Due, State
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.links import save_link
from chainlora.runs.loading_start import Start, check_start, load_start, need_layers
from chainlora.runs.locks import Scratch
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import check_base, noted_base
from chainlora.runs.paths import stage_folder
from chainlora.runs.resuming import need_pinned, source_digests
from chainlora.runs.saved_chain import as_adapter

logger = logging.getLogger(__name__)


def read_adapter(source: str) -> Start:
    """Read an adapter. Raises ChainLoRAError for a folder without one, or a kind unlike LoRA."""
    start = load_start(source)
    if start.state is not None:
        remedy = "chainlora combine RUN OTHER takes runs; for a saved chain, "
        remedy += as_adapter(start.state.run)
        raise RunError("an adapter is added to a run", f"{source}, a run or a saved chain", remedy)
    return start


def check_adapter(start: Start, base: OpenBase) -> None:
    """Raise ModelError or ChainError unless the base has the adapter's layers; read no weights."""
    assert start.adapter is not None
    need_layers(start.adapter, base.skeleton)
    for link in start.links:
        check_link(link, base.skeleton)
        try:
            check_targets(base.skeleton, link.config)
        except ModelError as error:
            rule = "an adapter must be on layers that links can adapt"
            got, _, _ = str(error).partition("; ")  # without its remedy, which is for a config
            raise ModelError(rule, f"others: {got}", MERGE) from error


def build_import(run: Path, due: Due, base: OpenBase | None = None) -> None:
    """Import an adapter of the plan, keep a sample of its rows, and write its entry.

    Raises RunError if the adapter or its rows have changed since they were added, ChainLoRAError
    if they cannot be read.
    """
    scratch = Scratch(run, stage_folder(run, due.place))
    scratch.clear()
    try:
        _import(run, due, base)
    except ChainLoRAError:
        scratch.undo()
        raise


def _import(run: Path, due: Due, base: OpenBase | None) -> None:
    config, history, key = config_of(run, due.stage), read_history(run), due.key
    need_pinned(run, key, due.stage.sources, source_digests(config))
    base = OpenBase.of_config(config, run).or_shared(base)
    start, base_facts = _fitted(run, config, history, base)
    rows, kept = _rows_of(config, base, run / TOKENIZER if history.tokenizer else None, start)
    links = dict(save_link(run, link, base_facts, key) for link in start.links)
    kept_digest = save_rows(run, kept, key)
    path = stage_folder(run, due.place) / CONFIG
    files.write_text(path, dump_config(config))
    entry = due.entry(
        State(base=base_facts.fingerprint, links=tuple(links)),
        tied=tuple(links),
        kept=kept_digest,
        training=due.training.model_copy(update={"rows": rows.digest}),
        files={CONFIG: files.sha256(path)},
    )

    update_history(run, lambda now: now.model_copy(update={"base": base_facts}).added(entry, links))


def _fitted(run: Path, config: RunConfig, history: History, base: OpenBase) -> tuple[Start, Base]:
    """Return the adapter as a link of the run's base, and the facts of that base."""
    if history.base.files is not None:
        check_base(history.base, run, files=base.files)
    start = load_start(str(config.start))
    chain = base.chain(seed=config.train.seed, hold=config.chain.hold)
    check_start(start, chain, config.model)
    for link in start.links:
        check_link(link, chain.model)
    return start, noted_base(config, chain, base.files)


def _rows_of(
    config: RunConfig, base: OpenBase, tokenizer: Path | None, start: Start
) -> tuple[Splits, Kept]:
    """Return the rows of an adapter, and the sample that is kept. Raises DataError without rows."""
    run_tokenizer = base.tokenizer(tokenizer)
    if start.tokenizer is not None and config.data.chat_template is None:
        template = load_tokenizer(start.tokenizer).chat_template
        if template is not None and template != run_tokenizer.chat_template:
            logger.warning(
                "the adapter has another chat template than the run; the run's template is used"
            )
    rows = prepare_splits(config.data, run_tokenizer, base.context)
    if not rows.train:
        rule = "a combination reads training rows of an adapter"
        raise DataError(rule, "none that can be read", "give some of its training rows")
    return rows, rows.kept()
