"""A state taken apart: each stage as an adapter of its own, for servers that add adapters at scales
chosen with a request; ``serving_template.jinja`` is the sheet that says how to serve them.

Each adapter has its stage at strength 1, so that a server's scale is a strength. At the strengths
of the state they add up to its one adapter. Their names end in digits of the state's digest: a
server that caches by name then never takes another state's adapter for one of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from chainlora.chain.chain import Chain
from chainlora.chain.link import switched_on
from chainlora.errors import ChainError
from chainlora.files import write_text
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.cards import QUOTING, Naming, place_of, public_name, served_rank
from chainlora.runs.history import Term
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.state import OpenState

SHEET = "SERVING.md"
_TEMPLATE = Path(__file__).with_name("serving_template.jinja")


class Part(NamedTuple):
    """A stage of a state: its adapter's name, its strength there, and the stage alone at 1."""

    name: str
    stage: str
    strength: float
    state: OpenState

    def told(self, rank: int, error: float) -> dict[str, Any]:
        """Return what an export tells of it."""
        known = {"stage": self.stage, "adapter": self.name, "strength": self.strength}
        return {**known, "rank": rank, "error": error}


def taken_apart(run: Address | Chain, num_links: int | None = None) -> tuple[OpenState, list[Part]]:
    """Return a state, and its stages that are switched on.

    Raises ChainError for what has no stages, RunError for links that are no low-rank sums.
    """
    if isinstance(run, Chain) or num_links is not None:
        got = "a chain in memory" if isinstance(run, Chain) else f"its first {num_links} links"
        rule, remedy = "Cannot take a chain apart: only states of runs have stages", "name one"
        raise ChainError(rule, got, remedy)
    state = open_run(run)
    state.need_one_strength(state.stages)
    stages: dict[str, list[Term]] = {}
    for term in state.history.in_order(state.state.terms):
        facts = state.history.links[term.link]
        if term.strength:
            # servers add only the factors of LoRA
            need_low_rank_sum(facts.link_config(), facts.stage, "export the state merged")
            stages.setdefault(facts.stage, []).append(term)
    if not stages:
        rule, remedy = "an adapter needs at least one link", "switch a stage on, or take the base"
        raise ChainError(rule, "a chain of none", remedy)
    parts = []
    for stage, terms in stages.items():
        whole = tuple(term.model_copy(update={"strength": 1.0}) for term in terms)
        alone = state.state.model_copy(update={"terms": whole})
        trained = state.history.find(stage) or state.entry  # has its config and tokenizer
        part = replace(state, state=alone, entry=trained)
        name = f"{stage}-{state.state.digest[:8]}"
        parts.append(Part(name, stage, terms[0].strength, part))
    return state, parts


def write_sheet(
    folder: Path,
    state: OpenState,
    adapters: Sequence[Mapping[str, Any]],
    naming: Naming,
    *,
    as_gguf: bool,
) -> str:
    """Write the commands by which servers add these adapters (`Part.told`); return its name."""
    base = naming.base or public_name(state.base.model)
    strengths = {each["adapter"]: each["strength"] for each in adapters}
    scales = [{"id": place, "scale": scale} for place, scale in enumerate(strengths.values())]
    scales[-1]["scale"] = 0
    chosen = ",".join(f"{each['stage']}={each['strength']}" for each in adapters)
    is_mixed = state.state != state.history.state_of(state.key)
    text = _TEMPLATE.read_text(encoding="utf-8")
    sheet = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True).render(
        adapters=adapters,
        address=f"RUN@{state.key}" + (f" --stages {chosen}" if is_mixed else ""),
        as_gguf=as_gguf,
        base=base,
        digest=state.state.digest,
        modules=" ".join(f"{name}={name}" for name in strengths),
        place=place_of(base),
        scaled=",".join(f"{name}.gguf:{scale}" for name, scale in strengths.items()),
        served_rank=served_rank(switched_on(state.outlines()), max(e["rank"] for e in adapters)),
        strengths=json.dumps(strengths),
        without_last=json.dumps(scales),
        **QUOTING,
    )
    write_text(folder / SHEET, sheet)
    return SHEET
