"""Load a run as a live model: its base, its links, and the tokenizer of its rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chainlora.chain.adapters import is_transposed
from chainlora.chain.chain import Chain
from chainlora.config.schema import RunConfig
from chainlora.data.templates import set_chat_template
from chainlora.errors import RunError
from chainlora.models.identity import changed_files
from chainlora.models.loading import load_tokenizer
from chainlora.models.quantizing import is_quantized_model
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.entries import CAUSAL, Base
from chainlora.runs.open_base import OpenBase
from chainlora.runs.state import OpenState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chainlora.models.loading import CausalModel


def load_run(
    run: Address,
    *,
    num_links: int | None = None,
    dtype: str | torch.dtype | None = None,
    as_trained: bool = False,
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a run as a plain transformers model with merged links, and its tokenizer.

    Args:
        run: an address or a state (`open_run`).
        num_links: merge only the first links (0: the base); by default all of the state.
        dtype: dtype of the model; by default that of the run.
        as_trained: keep a base that was quantised while loading quantised, with links in adapter
            layers. By default links are merged into its unquantised weights.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        RunError: a file of the run or the base has changed, or the run has tied no link yet.
        ConfigError: an unknown dtype.
    """
    state = open_run(run)
    _need_loadable(state)
    links = state.links(num_links)  # before the model: a missing link is found at once
    if not links and num_links is None:
        _refuse_untrained(state)
    base = state.base
    quantize = base.quantize if as_trained else None
    opened = OpenBase(base.model, dtype or base.dtype, quantize)
    device = None if opened.is_quantized else torch.device("cpu")
    chain, tokenizer = _chain_on(opened, state, device=device)
    model: Any = chain.model
    is_quantized = is_quantized_model(model)
    if is_quantized and not as_trained:
        raise RunError(
            "links are merged into weights of 16 or 32 bits",
            f"{base.model}, whose checkpoint is quantised",
            "use --to adapter, which PEFT loads on this base, or merges onto the one before "
            "quantisation",
        )
    chain.add(*links)
    if not is_quantized:
        chain.detach()
    return model, tokenizer


def chain_on_base(
    state: OpenState, hold: str | None = None, base: OpenBase | None = None
) -> tuple[Chain, Any]:
    """Return a chain without links on the base of a run, and the tokenizer of its rows.

    `hold` is by default chosen by the model; `base` is opened here by default. Raises RunError for
    another base than the run's.
    """
    _need_loadable(state)
    return _chain_on(OpenBase.of_state(state).or_shared(base), state, hold=hold)


def _chain_on(base: OpenBase, state: OpenState, **keys: Any) -> tuple[Chain, Any]:
    """Return a chain on a checked base, and the tokenizer; `keys` are those of `OpenBase.chain`."""
    if state.base.files is not None:
        check_base(state.base, state.run, files=base.files)
    chain = base.chain(**keys)
    # a saved chain has no file hashes, and a fingerprint is that of the weights as they were loaded
    if state.base.files is None and state.base.quantize == base.quantize:
        check_base(state.base, state.run, chain=chain)
    return chain, tokenizer_of(state, base)


def _need_loadable(state: OpenState) -> None:
    """Raise RunError for a chain on another kind of model or without its name."""
    model, task = state.base.model, state.base.task_type
    if not model or task != CAUSAL:
        rule = "only chains on causal language models that have a name load their model themselves"
        what = "a model without a name" if task == CAUSAL else task or "another model"
        got = f"one on {what} in {state.run}"
        remedy = f"load its model and call load_chain({str(state.run)!r}, model).detach()"
        raise RunError(rule, got, remedy)


def tokenizer_of(state: OpenState, base: Path | OpenBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run's rows: the base's or its own, with the run's chat template."""
    own = state.tokenizer()
    loaded = base.tokenizer(own) if isinstance(base, OpenBase) else load_tokenizer(own or base)
    if state.has_run:
        set_chat_template(loaded, state.config().data)
    return loaded


def _refuse_untrained(state: OpenState) -> None:
    """Raise RunError for a stage in training without a tied link: it would be just the base."""
    if state.draft is not None and state.config().chain.ranks:  # a run may have no links at all
        rule = f"Cannot load {state.run}: stage {state.key} is unfinished, and has no whole link"
        finish = f"chainlora train {shlex.quote(str(state.run))} finishes it"
        raise RunError(f"{rule}. {finish}; --links 0 takes the base.")


def noted_base(config: RunConfig, chain: Chain, files: dict[str, str]) -> Base:
    """Return the facts of a base, for a run's history; `files` are the hashes of its files."""
    return Base(
        model=config.model,
        fingerprint=chain.base_fingerprint,
        dtype=config.train.dtype,
        files=files,
        fan_in_fan_out=any(map(is_transposed, chain.model.modules())),
        quantize=config.quantize,
    )


def check_base(
    before: Base,
    run: Path | str,
    *,
    files: Mapping[str, str] | None = None,
    chain: Chain | None = None,
) -> None:
    """Raise RunError unless a model is the base that `run` was trained on.

    Models are compared by the hashes of their `files` (`models.identity`), or for a chain without a
    run by its `base_fingerprint`.
    """
    wrong = ""
    if before.files is not None and files is not None:
        if changed := changed_files(before.files, files):
            wrong = f"another {changed[0]}" + " and more" * bool(changed[1:])
    elif chain is not None and chain.base_fingerprint != before.fingerprint:
        _check_comparable(before, chain)
        wrong = f"fingerprint {chain.base_fingerprint[:12]} for {before.fingerprint[:12]}"
    if wrong:
        name = f", {before.model}" if before.model else ""
        rule = f"the base model must be the one {run} was trained on{name}"
        raise RunError(rule, wrong, "restore it, or start over")


def _check_comparable(before: Base, chain: Chain) -> None:
    """Raise RunError for dtypes in which the fingerprints of one model differ."""
    dtype = str(next(chain.model.parameters()).dtype).removeprefix("torch.")
    if dtype != before.dtype and "float16" in (dtype, before.dtype):
        other = before.dtype if dtype == "float16" else dtype
        rule = f"a base in float16 cannot be compared with one in {other}"
        raise RunError(rule, f"{dtype} for {before.dtype}", f"load the model in {before.dtype}")
