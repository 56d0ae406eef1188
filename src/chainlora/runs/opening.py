"""A run on disk as a live model: its base, its links, and the tokenizer that its rows had."""

from __future__ import annotations

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
from chainlora.runs.history import CAUSAL, Base
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
    """Load a run's base, put its chain on, and return (plain transformers model, tokenizer).

    The chain is that of the state that `run` names, or the first `num_links` links (0: the base);
    `dtype` defaults to the run's own. The links of a quantised base are merged into it as it was
    before; with `as_trained` they are left on the quantised one, in adapter layers. Raises RunError
    when a file of the run or the base has changed, or the run was killed before it had anything;
    ConfigError for a dtype that no weights have.
    """
    state = open_run(run)
    _need_causal(state)
    links = state.links(num_links)  # first, since a missing one is found at once
    if not links and num_links is None:
        _refuse_untrained(state)
    base = state.base
    quantize = base.quantize if as_trained else None
    opened = OpenBase(base.model, dtype or base.dtype, quantize)
    chain, tokenizer = _chain_on(opened, state, device=torch.device("cpu"))
    model: Any = chain.model
    is_quantized = is_quantized_model(model)
    if is_quantized and not as_trained:
        raise RunError(
            f"links are merged into weights of 16 or 32 bits (got {base.model}, whose "
            "checkpoint is quantised); use --to adapter, which PEFT loads on this base, or "
            "merges onto the one before quantisation"
        )
    chain.add(*links)
    if not is_quantized:
        chain.detach()
    return model, tokenizer


def chain_on_base(
    state: OpenState, hold: str | None = None, base: OpenBase | None = None
) -> tuple[Chain, Any]:
    """Return a chain of no links on the base of a run, and the tokenizer of its rows.

    `hold` is by default what suits the model, `base` is opened here by default. Raises RunError
    where it is not the base that the run was trained on.
    """
    _need_causal(state)
    return _chain_on(OpenBase.of_state(state).or_shared(base), state, hold=hold)


def _chain_on(base: OpenBase, state: OpenState, **keys: Any) -> tuple[Chain, Any]:
    if state.base.files is not None:
        check_base(state.base, state.run, files=base.files)
    chain = base.chain(**keys)
    if state.base.files is None:  # a saved chain, which knows no files
        check_base(state.base, state.run, fingerprint=chain.base_fingerprint)
    return chain, _settled(base.tokenizer(state.tokenizer()), state)


def _need_causal(state: OpenState) -> None:
    base = state.base
    if base.task_type != CAUSAL:
        raise RunError(
            "only chains on causal language models bring their model with them (got one on "
            f"{base.task_type or 'another model'} in {state.run}); load its model and call "
            f"load_chain({str(state.run)!r}, model).detach()"
        )


def tokenizer_of(state: OpenState, base: Path | OpenBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run's rows: the base's or its own, with its chat template."""
    own = state.tokenizer()
    found = base.tokenizer(own) if isinstance(base, OpenBase) else load_tokenizer(own or base)
    return _settled(found, state)


def _settled(tokenizer: Any, state: OpenState) -> Any:
    if state.has_run:
        set_chat_template(tokenizer, state.config().data)
    return tokenizer


def _refuse_untrained(state: OpenState) -> None:
    """Refuse a run that was to train something and has not yet: the base would pass for it."""
    if not state.has_run:
        raise RunError(
            f"a saved chain must have a link (got none in {state.run}); take the base by 0 links"
        )
    if state.draft is not None and state.config().chain.ranks:  # a run may plan none
        raise RunError(
            f"a run must have tied its first link (got none in {state.run}); train it again to "
            "resume it, or take the base by --links 0"
        )


def noted_base(config: RunConfig, chain: Chain, files: dict[str, str]) -> Base:
    """Return what a run notes of the model that it is tuned on; `files` are their hashes."""
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
    fingerprint: str | None = None,
) -> None:
    """Raise RunError unless the model at hand is the one the run was trained on.

    It is known by its `files` (`models.identity`), or in chains without a run by its `fingerprint`.
    """
    wrong = ""
    if before.files is not None and files is not None:
        if changed := changed_files(before.files, files):
            wrong = f"another {changed[0]}" + " and more" * bool(changed[1:])
    elif fingerprint is not None and fingerprint != before.fingerprint:
        wrong = f"fingerprint {fingerprint[:12]} for {before.fingerprint[:12]}"
    if wrong:
        name = f", {before.model}" if before.model else ""
        raise RunError(
            f"the base model must be the one {run} was trained on{name} (got {wrong}); restore it, "
            "or start over"
        )
