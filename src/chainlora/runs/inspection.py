"""What each link of a run brought: loss, score, size and shape, overlap with earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chainlora.chain.link import Link, stack_links
from chainlora.chain.low_rank import (
    effective_rank,
    singular_values,
    stable_rank,
    subspace_overlap,
)
from chainlora.chain.showing import Shown
from chainlora.runs.reading import Address
from chainlora.runs.records import Record, last_loss, of_event
from chainlora.runs.stages import reader_of, readers_of_stages, unjudged_stage


def inspect_run(run: Address) -> dict[str, Any]:
    """Describe a run link by link.

    For each link, at strength 1: ``rank`` as it is stored, ``trained_rank``, ``steps``, mean
    training ``loss`` of its last tenth, validation ``score`` at its knot, ``delta_norm`` ‖ΔW‖_F
    over all modules, ``effective_rank`` exp(entropy of σ/Σσ) (Roy & Vetterli 2007) and
    ``stable_rank``, means over modules, ``overlap`` with each earlier link's A (mean squared cosine
    of the principal angles, averaged over modules; 1 is the same input subspace), ``spectrum`` (its
    singular values, their mean over modules), and ``modules`` (‖ΔW‖_F of each). ``numbers`` is what
    was decided when each stage began. ``finished`` and ``position`` say where the run is: the step
    and the number of whole links that a resume would start from. ``unjudged`` is the stage that
    `accept_links` has not judged yet.

    Every file of the run is checked first. Raises RunError for one that is missing or has changed.
    """
    reader = reader_of(run)
    manifest = reader.verify()
    # a saved chain has a live link where a run has a checkpoint
    links = reader.links_of(manifest, len(manifest.links) if manifest.has_run else None)
    readers = {manifest.stage: reader} | readers_of_stages(run)
    records = {stage: each.records() for stage, each in readers.items()}
    decided = {
        stage: readers[stage].manifest().model_dump(mode="json")["numbers"]
        for stage in dict.fromkeys([*manifest.stages, manifest.stage])
        if stage in readers
    }
    tuned = [replace(link, strength=1.0) for link in links]
    entries = manifest.links if manifest.has_run else manifest.loaded
    rows, ends = [], dict[str, int]()
    for link, tuned_link, entry in zip(links, tuned, entries, strict=True):
        end = ends[entry.stage] = ends.get(entry.stage, 0) + link.num_steps
        row = _describe(tuned_link, tuned[: link.index], records.get(entry.stage, []), end)
        rows.append(row | {"id": link.id, "stage": entry.stage, "strength": link.strength})
    is_sum = bool(links) and all(_is_low_rank(link) for link in links)
    whole = _sizes(_spectra(links).values()) if is_sum else {}
    found = {
        "run": str(run),
        "base": manifest.base.model,
        "hold": manifest.hold,
        "finished": reader.is_finished(manifest)
        or manifest.is_pruned
        or reader.num_links is not None
        or not manifest.has_run,
        "unjudged": unjudged_stage(reader),
        "position": {
            "step": manifest.position.step,
            "links": len(links),
            "planned_links": manifest.first + len(reader.config().chain.ranks)
            if manifest.has_run
            else len(links),
        },
        "links": rows,
        "chain": whole | {"links": len(links), "rank": sum(link.rank for link in links)},
        "numbers": {stage: numbers for stage, numbers in decided.items() if numbers},
        "selected": manifest.selected and manifest.selected.model_dump(mode="json"),
    }
    return Shown(found)


def _describe(
    link: Link, earlier: Sequence[Link], records: Sequence[Record], end: int
) -> dict[str, Any]:
    """Return what there is to say of a link that ends after step `end` of its stage: at its knot,
    or before it, where its stage kept the best point."""
    own = [r for r in records if r.get("link") == link.index and r["step"] <= end]
    last = [r for r in of_event(own, "eval") if r["step"] == end and r["where"] != "start"]
    keys = ("event", "step", "link", "where")
    row: dict[str, Any] = {
        "link": link.index,
        "rank": link.rank,
        "trained_rank": link.config.rank,
        "scaling": link.config.scaling,
        "steps": link.num_steps,
        "loss": last_loss(of_event(own, "step")),
        "scores": {k: v for k, v in last[-1].items() if k not in keys} if last else {},
    }
    if _is_low_rank(link):
        spectra = _spectra([link])
        row |= _sizes(spectra.values())
        row["spectrum"] = _mean_spectrum(list(spectra.values()))
        row["modules"] = {name: float(s.norm()) for name, s in spectra.items()}
        row["overlap"] = [_overlap(link, other) for other in earlier]
    return row


def _is_low_rank(link: Link) -> bool:
    return all(pair.magnitude is None for pair in link.factors.values())


def _spectra(links: Sequence[Link]) -> dict[str, Tensor]:
    """Return the singular values of what the links add up to, by module."""
    return {name: singular_values(pair.a, pair.b) for name, pair in stack_links(links).items()}


def _sizes(spectra: Iterable[Tensor]) -> dict[str, float]:
    spectra = [s for s in spectra if float(s.sum()) > 0]
    if not spectra:
        return {"delta_norm": 0.0, "effective_rank": 0.0, "stable_rank": 0.0}
    return {
        "delta_norm": float(torch.cat(spectra).norm()),
        "effective_rank": fmean(map(effective_rank, spectra)),
        "stable_rank": fmean(map(stable_rank, spectra)),
    }


def _mean_spectrum(spectra: Sequence[Tensor]) -> list[float]:
    """Return the mean of the modules' singular values, place by place, the largest first."""
    longest = max(map(len, spectra))
    padded = [functional.pad(s, (0, longest - len(s))) for s in spectra]
    return [float(value) for value in torch.stack(padded).mean(0)]


def _overlap(link: Link, other: Link) -> float:
    pairs = [(own, other.factors.get(name)) for name, own in link.factors.items()]
    overlaps = [subspace_overlap(own.a, theirs.a) for own, theirs in pairs if theirs is not None]
    return fmean(overlaps) if overlaps else 0.0
