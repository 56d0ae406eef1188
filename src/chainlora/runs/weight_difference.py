"""How far two states on one base are from each other: of each module, the difference of updates.

The updates are sums of links, so their difference is one too, from factors alone: a link that both
states have counts by the difference of its strengths, and cancels exactly where these are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from chainlora.chain.link import Factors, Link, stack_links
from chainlora.chain.low_rank import frobenius_norm, numerical_rank, singular_values
from chainlora.errors import RunError
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.state import OpenState


def need_one_base(a: OpenState, b: OpenState) -> None:
    """Raise RunError for states on different bases, or with links that are more than B·A."""
    if a.history.empty.base != b.history.empty.base:
        rule = "states that are compared must be on one base"
        got = f"{a} on {a.base.model}, {b} on {b.base.model}, which are different"
        raise RunError(rule, got, "name others")
    for state in (a, b):
        for facts in state.facts:
            need_low_rank_sum(facts.link_config(), state, "name others")


def weight_difference(a: OpenState, b: OpenState) -> dict[str, Any]:
    """Return the `modules` and their `total`: of each the Frobenius norms of the updates of a and b
    (`norm_a`, `norm_b`) and of their `difference`, which is also `relative` to the larger of these,
    and its numerical `rank`; of the total, that is the largest."""
    links = [_links(state) for state in (a, b)]
    sums = [stack_links([*each.values()]) for each in (*links, _less(*links))]
    names = dict.fromkeys(name for each in sums[:2] for name in each)
    modules = {name: _described(*(each.get(name) for each in sums)) for name in names}
    return {"modules": modules, "total": _total(modules)}


def _links(state: OpenState) -> dict[str, Link]:
    """Return the links of a state by their digests."""
    terms = state.terms()
    return {term.link: link for term, link in zip(terms, state.links(), strict=True)}


def _less(a: Mapping[str, Link], b: Mapping[str, Link]) -> dict[str, Link]:
    """Return the links of the difference of two sums, by digests."""

    def found() -> Iterator[tuple[str, Link]]:
        for digest, link in {**b, **a}.items():
            strengths = [side[digest].strength if digest in side else 0.0 for side in (a, b)]
            yield digest, replace(link, strength=strengths[0] - strengths[1])

    return dict(found())


def _described(a: Factors | None, b: Factors | None, less: Factors | None) -> dict[str, Any]:
    norms = [0.0 if each is None else frobenius_norm(each.a, each.b) for each in (a, b)]
    row = {"norm_a": norms[0], "norm_b": norms[1]}
    if less is None:  # the same links
        return row | {"difference": 0.0, "relative": 0.0, "rank": 0}
    s = singular_values(less.a, less.b)
    size = max(less.b.shape[0], less.a.shape[1])
    return row | _relative(float(s.norm()), norms) | {"rank": numerical_rank(s, size)}


def _relative(difference: float, norms: list[float]) -> dict[str, float]:
    larger = max(norms)
    return {"difference": difference, "relative": difference / larger if larger else 0.0}


def _total(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("norm_a", "norm_b", "difference")
    norms = {key: math.hypot(*(row[key] for row in modules.values())) for key in keys}
    relative = _relative(norms["difference"], [norms["norm_a"], norms["norm_b"]])
    return norms | relative | {"rank": max((row["rank"] for row in modules.values()), default=0)}
