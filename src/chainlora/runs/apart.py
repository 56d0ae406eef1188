"""Split a state into one adapter for each stage, for servers that set a scale for each request.

Each adapter has its stage at strength 1, so a server's scale is the strength of the stage. At the
strengths of the state, the adapters sum to its single adapter. Their names end in digits of the
state's digest, so that a server that caches by name never confuses adapters of two states.
``serving_template.jinja`` has the text that explains how to serve them.
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
    """A stage of a state."""

    name: str  # of its adapter
    stage: str
    strength: float  # in the whole state
    state: OpenState  # the stage alone, at strength 1

    def told(self, rank: int, error: float) -> dict[str, Any]:
        """Return the facts of its adapter, for the result of an export."""
        facts = {"stage": self.stage, "adapter": self.name, "strength": self.strength}
        return {**facts, "rank": rank, "error": error}


def taken_apart(run: Address | Chain, num_links: int | None = None) -> tuple[OpenState, list[Part]]:
    """Return a state, and its stages that are switched on.

    Raises ChainError for a chain without stages, RunError for links that are not low-rank sums.
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
            # servers can add only LoRA factors
            need_low_rank_sum(facts.link_config(), facts.stage, "export the state merged")
            stages.setdefault(facts.stage, []).append(term)
    if not stages:
        rule, remedy = "an adapter needs at least one link", "switch a stage on, or take the base"
        raise ChainError(rule, "a chain of none", remedy)
    parts = []
    for stage, terms in stages.items():
        full = tuple(term.model_copy(update={"strength": 1.0}) for term in terms)
        alone = state.state.model_copy(update={"terms": full})
        entry = state.history.find(stage) or state.entry  # its config and tokenizer are exported
        part = replace(state, state=alone, entry=entry)
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
    """Write ``SERVING.md``, with commands to serve these adapters; return its name.

    `adapters` are the facts by `Part.told`.
    """
    base = naming.base or public_name(state.base.model)
    strengths = {adapter["adapter"]: adapter["strength"] for adapter in adapters}
    scales = [{"id": place, "scale": scale} for place, scale in enumerate(strengths.values())]
    scales[-1]["scale"] = 0
    chosen = ",".join(f"{adapter['stage']}={adapter['strength']}" for adapter in adapters)
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
