"""Describe each link of a run: loss, score, norm, spectrum, overlap with earlier links."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """Describe a run link by link. All its files are checked first.

    Args:
        run: an address or a state (`open_run`).

    Returns:
        A mapping. ``links`` has for each link:

        - ``rank`` as stored, ``trained_rank``, ``steps``;
        - ``loss``: mean training loss of its last tenth; ``scores``: validation at its knot;
        - ``delta_norm``: ‖ΔW‖_F over all modules; ``modules``: ‖ΔW‖_F of each module;
        - ``effective_rank``: exp(entropy of σ/Σσ) (Roy & Vetterli 2007), and ``stable_rank``:
          ‖·‖_F²/‖·‖₂², means over modules;
        - ``spectrum``: singular values, means over modules;
        - ``overlap`` with each earlier link: mean squared cosine of the principal angles of A,
          averaged over modules; 1 is the same input subspace.

        ``chain`` has the same of all links together. ``numbers`` are those decided when each stage
        began. ``selected`` is the best point, if the last stage ends there before its last step.
        ``finished`` and ``position`` are the progress of the last stage: its step, and the number
        of whole links that a resume would start from.

    Raises:
        RunError: a file is missing or has changed.
    """
    state = open_run(run).verify()
    links = state.read(state.sequence)
    chain = _sizes(_spectra(links).values()) if links else {}
    is_trained = state.entry is not None and state.entry.kind == "stage"
    planned = state.first + len(state.config().chain.ranks) if is_trained else len(links)
    numbers = {e.key: e.training.model_dump(mode="json")["numbers"] for e in state.lineage}
    description = {
        "run": str(state.run),
        "base": state.base.model,
        "hold": state.history.hold,
        "state": state.state.digest,
        "finished": state.draft is None,
        "position": {"step": _step(state), "links": len(links), "planned_links": planned},
        "links": _rows(state, links),
        "chain": chain | {"links": len(links), "rank": sum(link.rank for link in links)},
        "numbers": {name: decided for name, decided in numbers.items() if decided},
        "selected": _selected(state),
    }
    return Shown(description)


def _rows(state: OpenState, links: Sequence[Link]) -> list[dict[str, Any]]:
    """Return a description of each link; `links` are those of `state.sequence`."""
    stages = [state.history.links[link].stage for link in state.sequence]
    records = {name: state.at(name).records() for name in {*stages} - {state.key}}
    records[state.key] = state.records()
    rows, ends, places = [], dict[str, int](), dict[str, int]()  # last step and place, by stage
    for link, stage in zip(links, stages, strict=True):
        end = ends[stage] = ends.get(stage, 0) + link.num_steps
        place = places[stage] = places.get(stage, -1) + 1
        row = _describe(link, links[: link.index], records.get(stage, []), place, end)
        rows.append(row | {"stage": stage, "place": place})
    return rows


def _step(state: OpenState) -> int:
    """Return the number of steps of the last stage."""
    if state.draft is not None:
        return state.draft.position.step
    result = state.result()
    if result is not None:
        return int(result["steps"])
    return sum(facts.num_steps for facts in state.facts)  # a saved chain has no result


def _selected(state: OpenState) -> dict[str, Any] | None:
    """Return the best point of the last stage, None if the stage ends at its last step.

    The point has its ``step``, the number of whole links up to it (``num_links``), and ``partial``
    if it lies inside the next one.
    """
    trained, facts = state.entry, state.history.links
    if trained is None or trained.kind != "stage":
        return None
    links = [link for link in trained.state.links if facts[link].stage == trained.key]
    if links == list(trained.tied):
        return None
    partial = bool(links) and links[-1] not in trained.tied
    step = sum(facts[link].num_steps for link in links)
    return {"step": step, "num_links": len(links) - partial, "partial": partial}


def _describe(
    link: Link, earlier: Sequence[Link], records: Sequence[Record], place: int, end: int
) -> dict[str, Any]:
    """Return a description of a link, by its tensors and the records of its stage.

    `place` is the number of the link in its stage, `end` the last step of the link in it.
    """
    of_link = [r for r in records if r.get("link") == place and r["step"] <= end]
    last = [r for r in of_event(of_link, "eval") if r["step"] == end and r["where"] != "start"]
    keys = ("event", "step", "link", "where")
    row: dict[str, Any] = {
        "link": link.index,
        "rank": link.rank,
        "trained_rank": link.config.rank,
        "scaling": link.config.scaling,
        "steps": link.num_steps,
        "loss": last_loss(of_event(of_link, "step")),
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
    """Return the singular values of the sum of links, by module."""
    return {name: singular_values(pair.a, pair.b) for name, pair in stack_links(links).items()}


def _sizes(spectra: Iterable[Tensor]) -> dict[str, float]:
    """Return norm, effective rank and stable rank of updates, by their singular values."""
    spectra = [s for s in spectra if float(s.sum()) > 0]
    if not spectra:
        return {"delta_norm": 0.0, "effective_rank": 0.0, "stable_rank": 0.0}
    return {
        "delta_norm": float(torch.cat(spectra).norm()),
        "effective_rank": fmean(map(effective_rank, spectra)),
        "stable_rank": fmean(map(stable_rank, spectra)),
    }


def _overlap(link: Link, other: Link) -> float:
    pairs = [(factors, other.factors.get(name)) for name, factors in link.factors.items()]
    overlaps = [subspace_overlap(one.a, two.a) for one, two in pairs if two is not None]
    return fmean(overlaps) if overlaps else 0.0
