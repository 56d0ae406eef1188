"""A merged chain in four bits again: what its owner asks for by name, and what that loses.

A link moves a weight by about a percent; a 4-bit weight has 16 levels in a block. So quantising the
merged weights loses part of the update and adds rounding. Both are measured over all adapted
modules, with Q quantised and dequantised, and ΔQ = Q(W_0 + ΔW) − Q(W_0):

    lost = 1 − ⟨ΔQ, ΔW⟩ / ‖ΔW‖²      of the update: what does not arrive
    noise = ‖ΔQ − ΔW‖ / ‖ΔW‖         rounding, in sizes of the update
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chainlora import files
from chainlora.chain.adapters import Factors, dequantized
from chainlora.chain.link import stack_links, switched_on
from chainlora.errors import RunError
from chainlora.models.checkpoint import save_model
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_model
from chainlora.runs.beside import copy_licences
from chainlora.runs.cards import UNNAMED, Card, Naming, story_of, write_card
from chainlora.runs.export import empty_folder, export_merged
from chainlora.runs.reading import Address
from chainlora.runs.stages import open_run


def export_quantized(
    run: Address,
    output: str | Path,
    kind: str,
    *,
    num_links: int | None = None,
    naming: Naming = UNNAMED,
) -> dict[str, Any]:
    """Write the run's model, links merged onto the whole base and quantised then; say what is lost.

    The result loads with transformers. Raises RunError for a chain without links, and ChainError
    for one that is no sum (DoRA).
    """
    output = empty_folder(output)
    reader = open_run(run)
    manifest = reader.manifest()
    links = switched_on(reader.links_of(manifest, num_links))
    if not links:
        raise RunError(
            f"--quantize needs a chain with a link (got none in {run}); quantise the base itself"
        )
    deltas = stack_links(links)  # refused before the long work
    with files.replaced_folder(output) as folder:
        merged = folder / "merged"
        done = export_merged(run, merged, num_links=num_links)
        dtype = getattr(torch, done["dtype"])
        model, tokenizer = load_model(merged, dtype, quantize=kind)
        files.remove(merged)
        before, _ = load_model(manifest.base.model, dtype, quantize=kind)
        lost, noise = lost_update(model, before, deltas)
        save_model(model, tokenizer, folder)
        copy_licences(resolve_model(manifest.base.model), folder)  # `export_merged` checked it
        card = Card(
            f"with a chain of {len(links)} LoRA link(s) merged into its weights, which were then "
            f"quantised ({kind}): {lost:.0%} of the update is lost, under rounding of {noise:.1f} "
            "times its size.",
            manifest.base.model,
            "transformers",
            links,
            naming=naming,
            story=story_of(run, num_links),
        )
        write_card(folder, card)
    return done | {"output": str(output), "quantize": kind, "lost": lost, "noise": noise}


@torch.no_grad()
def lost_update(model: Any, before: Any, deltas: Mapping[str, Factors]) -> tuple[float, float]:
    """Return what of an update is lost between two quantised models, and the rounding."""
    arrived, wrong, whole = [], [], []
    for name, factors in deltas.items():
        delta = factors.b @ factors.a
        found = dequantized(model.get_submodule(name)) - dequantized(before.get_submodule(name))
        arrived.append(float((found * delta).sum()))
        wrong.append(float((found - delta).square().sum()))
        whole.append(float(delta.square().sum()))
    total = math.fsum(whole)
    if not total:
        return 0.0, 0.0
    return 1 - math.fsum(arrived) / total, math.sqrt(math.fsum(wrong) / total)
