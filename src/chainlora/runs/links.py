"""Links on disk: each an ordinary PEFT adapter, checked against what the manifest says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import load_adapter, save_adapter, trained_module
from chainlora.chain.link import Link
from chainlora.errors import RunError
from chainlora.runs.manifest import DAMAGED, LinkEntry


def write_link(
    folder: Path,
    link: Link,
    base: str,
    *,
    fan_in_fan_out: bool = False,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write a link as a PEFT adapter, its scaling the tuned one whatever rank is stored."""
    power = 0.5 if link.config.rslora else 1
    save_adapter(
        folder,
        link.factors,
        link.config,
        rank=link.rank,
        alpha=link.config.scaling * link.rank**power,
        base=base,
        extra=link.extra,
        fan_in_fan_out=fan_in_fan_out,
        task_type=task_type,
    )


def read_link(folder: Path, entry: LinkEntry) -> Link:
    """Read a link back from its PEFT adapter and its manifest entry.

    Raises RunError unless both agree: formats without checksums are checked by this alone.
    """
    factors, extra, stored = load_adapter(folder)
    config = entry.link_config()
    link = Link(entry.index, config, factors, extra, entry.num_steps, entry.error)
    wrong = _disagreement(link, entry, stored)
    if wrong is not None:
        raise RunError(f"a link must be as its run wrote it (got {wrong} in {folder}); {DAMAGED}")
    return link


def _disagreement(link: Link, entry: LinkEntry, stored: Mapping[str, Any]) -> str | None:
    """Return in what a link's tensors, its adapter config and its manifest entry differ."""
    if link.rank != entry.rank:
        return f"rank {link.rank}, manifest {entry.rank}"
    if not math.isclose(link.config.scaling, entry.scaling, rel_tol=1e-6):  # rounding of JSON: none
        return f"scaling {link.config.scaling}, manifest {entry.scaling}"
    if not _has_scaling(stored, entry.scaling):
        return f"adapter_config.json of another scaling than {entry.scaling}"
    named = stored.get("target_modules")
    if not isinstance(named, list) or set(map(str, named)) != set(link.factors):
        return "tensors of other modules than adapter_config.json names"
    for path, weight in _tensors(link):
        if not bool(torch.isfinite(weight).all()):
            return f"weights that are not finite at {path}"
    for path in link.extra:
        module = trained_module(path, link.config)
        if not any(module.endswith(name) for name in link.config.extra_modules):
            return f"weights of {module}, which the link did not train,"
    return None


def _has_scaling(stored: Mapping[str, Any], scaling: float) -> bool:
    rank, alpha = stored.get("r"), stored.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return False
    power = 0.5 if stored.get("use_rslora") else 1
    return math.isclose(alpha / rank**power, scaling, rel_tol=1e-6)


def _tensors(link: Link) -> list[tuple[str, Tensor]]:
    found = list(link.extra.items())
    for name, factors in link.factors.items():
        parts = (factors.a, factors.b, factors.bias, factors.magnitude)
        found += [(name, part) for part in parts if part is not None]
    return found
