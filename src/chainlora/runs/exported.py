"""Load a model or an export in place of a run, with the facts in its lineage.

An export is scored like its run: its rows are read by the config in ``lineage.json``, and an
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
    """Return ``(model, tokenizer)`` of a run, of an adapter on its base, or of a model.

    `num_links` takes only the first links of a run. `dtype` is by default that of the run, also for
    its export; float32 for other models.
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
    """Say whether a folder holds an adapter and no model."""
    has = [(folder / name).is_file() for name in ("adapter_config.json", "config.json")]
    return has == [True, False]


def _adapter_on_base(folder: Path, lineage: Lineage | None, dtype: str | torch.dtype) -> Loaded:
    """Return an adapter on the base that it names. Raises RunError if the base is not found."""
    start = load_start(folder)
    name = "" if start.adapter is None else start.adapter.base
    base_facts = None if lineage is None else lineage.history.base
    quantize = None if base_facts is None else base_facts.quantize
    base = OpenBase(from_above(name, folder), dtype, quantize)
    try:
        files = base.files
    except ModelError as error:
        rule = "the base of an adapter must be at hand"
        remedy = "set CHAINLORA_MODELS to the folder that holds it, or name it in that file"
        got = f"{name or 'none'} in {folder / 'adapter_config.json'}, which is not found"
        raise RunError(rule, got, remedy) from error
    if base_facts is not None:
        check_base(base_facts, folder, files=files)
    chain = base.chain(device=torch.device("cpu"))
    for note in put_on(start, chain).notes:
        logger.warning("%s", note)
    model: Any = chain.model
    if not is_quantized_model(model):
        chain.detach()
    return model, base.tokenizer(start.tokenizer)


# --- the lineage of an export ---


def lineage_at(place: str | Path) -> Lineage | None:
    """Return the lineage of an export (its folder, or a GGUF file in it); None of another model."""
    path = Path(expanduser(str(place)))
    folder = path.parent if path.suffix.lower() == ".gguf" else path
    return read_lineage(folder) if (folder / LINEAGE).is_file() else None


def config_of_export(place: str | Path) -> RunConfig | None:
    """Return the config of the last exported stage with rows of its own.

    Returns None for another model, and for the export of a saved chain.
    """
    lineage = lineage_at(place)
    if lineage is None:
        return None
    keys = [e.key for e in lineage.history.entries if not e.is_rehearsal]
    names = [key for key in keys if key in lineage.stages]
    if not names:
        return None
    tree = deepcopy(lineage.stages[names[-1]].config)
    refuse_paths(tree, Path(LINEAGE))  # the export may come from somebody else
    leave_out_helpers(tree, LINEAGE)
    return make_config(tree)
