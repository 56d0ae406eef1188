"""Check that PEFT loads an adapter completely, on its base without weights.

PEFT renames or drops weights of some architectures, which depends on the model, so each adapter is
checked. Merged checkpoints and GGUF files are not: tests compare them to the chain.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from chainlora.chain.adapters import Factors, is_transposed, linked_layer, reload_adapter
from chainlora.chain.checks import check_link, misfit
from chainlora.chain.link import Link
from chainlora.errors import ChainLoRAError, ModelError
from chainlora.models.loading import load_skeleton
from chainlora.runs.history import CAUSAL, Base

logger = logging.getLogger(__name__)


def check_adapter(
    folder: Path,
    skeleton: nn.Module | None,
    factors: Mapping[str, Factors],
    *,
    remedy: str = "export --to merged",
) -> None:
    """Raise ModelError unless PEFT loads all of an adapter onto its base, given without weights.

    Where there is none, nothing is checked.
    """
    if skeleton is None:
        return
    for name, pair in factors.items():
        if fault := misfit(pair, skeleton, name):
            raise ModelError(
                f"links must fit their base (got {fault}); restore the run's files, or the base"
            )
    wrong = reload_adapter(folder, skeleton, factors)
    if wrong is not None:
        raise ModelError(
            f"an adapter must load with PEFT as it was (got another {wrong}); please report it "
            f"with the model's name, and {remedy}"
        )


def stores_transposed(skeleton: nn.Module, links: Sequence[Link]) -> bool:
    """Say whether the modules of links store their weights (in × out), as GPT-2's do.

    Raises ChainError for links that do not fit the model.
    """
    for link in links:
        check_link(link, skeleton)
    names = {name for link in links for name in link.factors}
    return any(is_transposed(linked_layer(skeleton, name)) for name in names)


def skeleton_like(model: nn.Module) -> nn.Module | None:
    """Return a model of the same class and config, without weights."""
    if not isinstance(model, PreTrainedModel):
        return _none_since("its base is no model of transformers")
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def skeleton_of(base: Base) -> nn.Module | None:
    """Return a base without weights; where it is not at hand, that is said."""
    if base.task_type != CAUSAL:
        return _none_since("its base is no causal language model")
    if not base.model:
        return _none_since("its base has no name")
    try:
        return load_skeleton(base.model)
    except ChainLoRAError as error:
        return _none_since(error)


def _none_since(reason: object) -> nn.Module | None:
    """Return no base, and say why an adapter is not checked."""
    logger.warning("the adapter was not checked by loading it: %s", reason)
    return None
