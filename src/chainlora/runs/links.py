"""Links on disk: each an ordinary PEFT adapter, checked against what the manifest says of it.

The live link is tensors of its own (`Chain.live_state`), beside those of its optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chainlora import files
from chainlora.chain.adapters import load_adapter, save_adapter
from chainlora.chain.checks import link_fault
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError
from chainlora.runs.manifest import DAMAGED, Base, LinkEntry

_LINK, _OPTIMIZER = "link.safetensors", "optimizer.safetensors"


def write_link(folder: Path, link: Link, base: Base) -> None:
    """Write a link as a PEFT adapter, its scaling the tuned one whatever rank is stored."""
    power = 0.5 if link.config.rslora else 1
    save_adapter(
        folder,
        link.factors,
        link.config,
        rank=link.rank,
        alpha=link.config.scaling * link.rank**power,
        base=base.model,
        extra=link.extra,
        fan_in_fan_out=base.fan_in_fan_out,
        task_type=base.task_type,
    )


def read_link(folder: Path, entry: LinkEntry) -> Link:
    """Read a link back from its PEFT adapter and its manifest entry.

    Raises RunError unless both agree, and the adapter holds what such a link has and nothing else.
    """
    factors, extra, stored = load_adapter(folder)
    config = entry.link_config()
    link = Link(
        index=entry.index,
        config=config,
        factors=factors,
        extra=extra,
        num_steps=entry.num_steps,
        error=entry.error,
        id=entry.id,
        strength=entry.strength,
    )
    wrong = _disagreement(link, entry, stored)
    if wrong is not None:
        raise RunError("a link must be as its run wrote it", f"{wrong} in {folder}", DAMAGED)
    return link


def read_partial(folder: Path, index: int, config: LinkConfig) -> Link:
    """Read a link that was kept before it was whole, of which no entry tells."""
    factors, extra, _ = load_adapter(folder)
    return Link(index, config, factors, extra)


def _disagreement(link: Link, entry: LinkEntry, stored: Mapping[str, Any]) -> str | None:
    """Return in what a link, its adapter config and its manifest entry differ."""
    if link.rank != entry.rank:
        return f"rank {link.rank}, manifest {entry.rank}"
    if not math.isclose(link.config.scaling, entry.scaling, rel_tol=1e-6):  # rounding of JSON: none
        return f"scaling {link.config.scaling}, manifest {entry.scaling}"
    if not _has_scaling(stored, entry.scaling):
        return f"adapter_config.json of another scaling than {entry.scaling}"
    named = stored.get("target_modules")
    if not isinstance(named, list) or set(map(str, named)) != set(link.factors):
        return "tensors of other modules than adapter_config.json names"
    return link_fault(link)


def _has_scaling(stored: Mapping[str, Any], scaling: float) -> bool:
    rank, alpha = stored.get("r"), stored.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return False
    power = 0.5 if stored.get("use_rslora") else 1
    return math.isclose(alpha / rank**power, scaling, rel_tol=1e-6)


# --- the live link ---


def write_checkpoint(
    folder: Path, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    """Write the live link's state (`Chain.live_state`) and the optimizer's."""
    files.save_tensors(folder / _LINK, state)
    files.save_tensors(folder / _OPTIMIZER, optimizer)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the live link's state and the optimizer's."""
    optimizer = load_tensors(folder / _OPTIMIZER)
    if not all(name.partition(".")[0].isdecimal() for name in optimizer):
        raise RunError(
            f"{_OPTIMIZER} must hold an optimizer's state (got other tensors in {folder}); "
            f"{DAMAGED}"
        )
    return load_tensors(folder / _LINK), optimizer


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises RunError where that cannot be done."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"tensors must be readable (got {path}: {error}); {DAMAGED}") from None
