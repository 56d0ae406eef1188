"""`chainlora.diff`: how two states on one base differ, in their weights and in their answers.

The updates of states are sums of links, so their difference is one too, from factors alone: a link
that both states have counts by the difference of its strengths, and cancels exactly where these are
equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from chainlora.chain.link import Factors, Link, stack_links
from chainlora.chain.low_rank import frobenius_norm, numerical_rank, singular_values
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.answers import Prompt, Said, Source, answer, prompts_of
from chainlora.evaluation.scoring import rows_to_score
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.beginning import need_same_base
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.state import OpenState
from chainlora.showing import Shown

PROMPTS = 3  # of each stage


def diff(
    a: Address,
    b: Address,
    *,
    prompts: int | None = None,
    data: str | Path | None = None,
    max_new_tokens: int = 32,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Say how two states on one base differ: of one run, or of two.

    Args:
        a: a run, or one of its states.
        b: another one; either may be the base, ``RUN@base``.
        prompts: how many of the rows that each stage kept are answered by both. None: 3, or all of
            `data`. 0: none, and the base is not loaded.
        data: a file of rows to answer in their place, as the rows of `a` are read.
        max_new_tokens: most tokens of an answer.
        progress: told what is being answered.

    Returns ``modules`` and ``total`` (`weight_difference`), and ``answers``, by stage: how
    many rows were ``asked``, how many were ``right_a`` and ``right_b`` where that is known, and
    those that ``differ``, each with its prompt, what is expected, and both answers.

    Raises RunError for states of different bases, and with a LoRA bias.
    """
    if prompts is not None and prompts < 0:
        raise ConfigError("`prompts` must be 0 or more", prompts, "give 3, for example")
    one, other = open_run(a), open_run(b)
    need_one_base(one, other)
    if prompts != 0 and one.run != other.run:
        need_same_base(one, other)
    found = {"a": str(a), "b": str(b), "base": one.base.model} | weight_difference(one, other)
    sources = _sources(one, other, data, prompts)
    tell = progress or (lambda what: None)
    asked = _answers(one, other, sources, max_new_tokens, tell) if sources else {}
    return Shown(found | {"answers": asked})


MakeSource = Callable[[Any, int], Source]  # from a tokenizer and the model's context


def _sources(
    a: OpenState, b: OpenState, data: str | Path | None, wanted: int | None
) -> list[MakeSource]:
    """Return the rows to ask for, of each stage or of a file, before the base is loaded."""
    if wanted == 0:
        return []
    if data is not None:
        encode, _ = rows_to_score(a, data=str(data), limit=wanted)

        def of_file(tokenizer: Any, context: int) -> Source:
            asked, rows = encode(tokenizer, context)
            return Source("", rows, asked.stop)

        return [of_file]
    known = dict[str, Source]()
    for state in (a, b):
        kept = state.kept()
        for name, key in state.columns.items():
            if key in kept and state.keepers[key] not in known:
                taken = name in {source.stage for source in known.values()}
                stage = f"{name} of {state.run}" if taken else name
                rows = kept[key].scored[1][: PROMPTS if wanted is None else wanted]
                known[state.keepers[key]] = Source(stage, rows, kept[key].asked["stop"])
    return [partial(_as_it_is, source) for source in known.values()]


def _as_it_is(source: Source, tokenizer: Any, context: int) -> Source:
    return source


def _answers(
    a: OpenState,
    b: OpenState,
    sources: Sequence[MakeSource],
    max_new_tokens: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Answer rows in both states, on a base that is loaded once."""
    base = OpenBase.of_state(a)
    prompts: list[Prompt] = []
    said: list[list[Said]] = []
    for state in (a, b):
        tell(f"answers of {state}")
        chain, tokenizer = chain_on_base(state, base=base)
        chain.add(*state.links())
        if not prompts:
            context = context_length(chain.model)
            made = [make(tokenizer, context) for make in sources]
            prompts = prompts_of(made, tokenizer)
            if not prompts:
                rule, remedy = "rows that are answered have prompts", "--prompts 0 asks for none"
                raise RunError(
                    rule, f"none in {', '.join(s.stage or 'the file' for s in made)}", remedy
                )
        said.append(answer(str(state), chain.model, tokenizer, prompts, max_new_tokens))
    asked = zip(prompts, *said, strict=True)
    by_stage = groupby(asked, lambda each: each[0].stage)
    return {stage: _compared([*rows]) for stage, rows in by_stage}


def _compared(asked: Sequence[tuple[Prompt, Said, Said]]) -> dict[str, Any]:
    return {
        "asked": len(asked),
        "right_a": _right([said for _, said, _ in asked]),
        "right_b": _right([said for _, _, said in asked]),
        "differ": [*_differing(asked)],
    }


def _right(said: Sequence[Said]) -> int | None:
    known = [each.is_right for each in said if each.is_right is not None]
    return sum(known) if known else None


def _differing(asked: Sequence[tuple[Prompt, Said, Said]]) -> Iterator[dict[str, Any]]:
    for prompt, a, b in asked:
        if a.text != b.text:
            yield {"prompt": prompt.text, "expected": prompt.expected, "a": a.text, "b": b.text}


# --- weights ---


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
