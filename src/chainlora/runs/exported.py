"""What commands take in place of a run: a model, or an export of one, with what its lineage says.

An export is scored as its run is: its rows are read by the config in ``lineage.json``, and an
adapter is put on the base that it names.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chainlora.config.reading import leave_out_helpers, make_config
from chainlora.config.schema import RunConfig
from chainlora.config.template_names import refuse_paths
from chainlora.errors import ModelError, RunError
from chainlora.models.finding import from_above, names_a_file, resolve_model
from chainlora.models.loading import load_model
from chainlora.models.quantizing import is_quantized_model
from chainlora.runs.addresses import Address, nothing_at
from chainlora.runs.lineage import LINEAGE, Lineage, read_lineage
from chainlora.runs.loading_start import load_start, put_on
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import check_base, load_run
from chainlora.runs.paths import is_run
from chainlora.runs.state import OpenState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chainlora.models.loading import CausalModel

logger = logging.getLogger(__name__)

Loaded = tuple["CausalModel", "PreTrainedTokenizerBase"]


def load_run_or_model(
    run_or_model: Address, *, num_links: int | None = None, dtype: str | torch.dtype | None = None
) -> Loaded:
    """Return ``(model, tokenizer)`` of a run's chain, of an adapter on its base, or of a model as
    `load_model` takes it.

    `num_links` takes a run's chain as it was then; `dtype` defaults to that of the run, also of one
    that was exported, or float32.
    """
    if isinstance(run_or_model, OpenState) or is_run(run_or_model):
        return load_run(run_or_model, num_links=num_links, dtype=dtype, as_trained=True)
    lineage = lineage_at(run_or_model)
    dtype = dtype or ("float32" if lineage is None else lineage.history.base.dtype)
    folder = Path(expanduser(str(run_or_model)))
    if not _is_adapter(folder):
        try:
            folder = resolve_model(str(run_or_model))
        except ModelError as error:
            if names_a_file(str(run_or_model)):
                raise
            raise nothing_at(run_or_model, "model") from error
    if _is_adapter(folder):
        return _adapter_on_base(folder, lineage, dtype)
    return load_model(folder, dtype)


def _is_adapter(folder: Path) -> bool:
    has = [(folder / name).is_file() for name in ("adapter_config.json", "config.json")]
    return has == [True, False]


def _adapter_on_base(folder: Path, lineage: Lineage | None, dtype: str | torch.dtype) -> Loaded:
    """Return an adapter on the base that it names. Raises RunError where that is not at hand."""
    start = load_start(folder)
    named = "" if start.adapter is None else start.adapter.base
    known = None if lineage is None else lineage.history.base
    base = OpenBase(from_above(named, folder), dtype, None if known is None else known.quantize)
    try:
        files = base.files
    except ModelError as error:
        rule = "the base of an adapter must be at hand"
        remedy = "set CHAINLORA_MODELS to the folder that holds it, or name it in that file"
        got = f"{named or 'none'} in {folder / 'adapter_config.json'}, which is not found"
        raise RunError(rule, got, remedy) from error
    if known is not None:
        check_base(known, folder, files=files)
    chain = base.chain(device=torch.device("cpu"))
    for note in put_on(start, chain).notes:
        logger.warning("%s", note)
    model: Any = chain.model
    if not is_quantized_model(model):
        chain.detach()
    return model, base.tokenizer(start.tokenizer)


# --- what the lineage of an export says ---


def lineage_at(place: str | Path) -> Lineage | None:
    """Return the lineage of an export, a folder or a GGUF file in one; None of another model."""
    path = Path(expanduser(str(place)))
    folder = path.parent if path.suffix.lower() == ".gguf" else path
    return read_lineage(folder) if (folder / LINEAGE).is_file() else None


def config_of_export(place: str | Path) -> RunConfig | None:
    """Return the config of the last stage with rows of its own, as a run gives it; None of another
    model, and of a saved chain."""
    lineage = lineage_at(place)
    if lineage is None:
        return None
    found = [e.key for e in lineage.history.entries if not e.is_rehearsal]
    names = [key for key in found if key in lineage.stages]
    if not names:
        return None
    tree = deepcopy(lineage.stages[names[-1]].config)  # it may come from somebody else
    refuse_paths(tree, Path(LINEAGE))
    leave_out_helpers(tree, LINEAGE)
    return make_config(tree)
