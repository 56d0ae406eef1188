"""What each link of a run brought: loss, score, size and shape, overlap with earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chainlora.chain.link import Link, stack_links
from chainlora.chain.low_rank import effective_rank, singular_values, stable_rank, subspace_overlap
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.records import Record, last_loss, of_event
from chainlora.runs.state import OpenState
from chainlora.showing import Shown


def inspect_run(run: Address) -> dict[str, Any]:
    """Describe a run link by link.

    For each link, at strength 1: ``rank`` as it is stored, ``trained_rank``, ``steps``, mean
    training ``loss`` of its last tenth, validation ``score`` at its knot, ``delta_norm`` ‖ΔW‖_F
    over all modules, ``effective_rank`` exp(entropy of σ/Σσ) (Roy & Vetterli 2007) and
    ``stable_rank``, means over modules, ``overlap`` with each earlier link's A (mean squared cosine
    of the principal angles, averaged over modules; 1 is the same input subspace), ``spectrum`` (its
    singular values, their mean over modules), and ``modules`` (‖ΔW‖_F of each). ``numbers`` is what
    was decided when each stage began. ``selected`` is the best point that the last stage ends at,
    where that is not its last step. ``finished`` and ``position`` say where the run is: the step of
    its last stage and the number of whole links that a resume would start from.

    Every file of the run is checked first. Raises RunError for one that is missing or has changed.
    """
    state = open_run(run).verify()
    links = state.read(state.sequence)
    places = [state.history.links[term.link].stage for term in state.sequence]
    records = {name: state.at(name).records() for name in {*places} - {state.stage}}
    records[state.stage] = state.records()
    tuned = [replace(link, strength=1.0) for link in links]
    rows, ends, own = [], dict[str, int](), dict[str, int]()
    for link, tuned_link, stage in zip(links, tuned, places, strict=True):
        end = ends[stage] = ends.get(stage, 0) + link.num_steps
        place = own[stage] = own.get(stage, -1) + 1
        row = _describe(tuned_link, tuned[: link.index], records.get(stage, []), place, end)
        rows.append(row | {"stage": stage, "place": place, "strength": link.strength})
    whole = _sizes(_spectra(links).values()) if links else {}
    is_trained = state.trained is not None and state.trained.kind == "stage"
    planned = state.first + len(state.config().chain.ranks) if is_trained else len(links)
    known = {e.key: e.training.model_dump(mode="json")["numbers"] for e in state.lineage}
    found = {
        "run": str(state.run),
        "base": state.base.model,
        "hold": state.history.hold,
        "state": state.state.digest,
        "finished": state.draft is None,
        "position": {"step": _step(state), "links": len(links), "planned_links": planned},
        "links": rows,
        "chain": whole | {"links": len(links), "rank": sum(link.rank for link in links)},
        "numbers": {name: numbers for name, numbers in known.items() if numbers},
        "selected": _selected(state),
    }
    return Shown(found)


def _step(state: OpenState) -> int:
    """Return the steps of the stage that was trained last."""
    if state.draft is not None:
        return state.draft.position.step
    result = state.result()
    if result is not None:
        return int(result["steps"])
    return sum(facts.num_steps for facts in state.facts)  # of a saved chain


def _selected(state: OpenState) -> dict[str, Any] | None:
    """Return the best point that a stage ends at, where that is not its end: its step, the whole
    links up to it, and whether it lies inside the next."""
    trained, links = state.trained, state.history.links
    if trained is None or trained.kind != "stage":
        return None
    own = [t.link for t in trained.state.terms if links[t.link].stage == trained.key]
    if own == list(trained.tied):
        return None
    partial = bool(own) and own[-1] not in trained.tied
    step = sum(links[link].num_steps for link in own)
    return {"step": step, "num_links": len(own) - partial, "partial": partial}


def _describe(
    link: Link, earlier: Sequence[Link], records: Sequence[Record], place: int, end: int
) -> dict[str, Any]:
    """Return what there is to say of a link, at a `place` in its stage, that ends after step `end`
    of it: at its knot, or before it, where its stage kept the best point."""
    own = [r for r in records if r.get("link") == place and r["step"] <= end]
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
    spectra = _spectra([link])
    padded = pad_sequence(list(spectra.values()), batch_first=True)  # [modules, longest]
    return row | {
        **_sizes(spectra.values()),
        "spectrum": padded.mean(0).tolist(),
        "modules": {name: float(s.norm()) for name, s in spectra.items()},
        "overlap": [_overlap(link, other) for other in earlier],
    }


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


def _overlap(link: Link, other: Link) -> float:
    pairs = [(own, other.factors.get(name)) for name, own in link.factors.items()]
    overlaps = [subspace_overlap(own.a, theirs.a) for own, theirs in pairs if theirs is not None]
    return fmean(overlaps) if overlaps else 0.0
