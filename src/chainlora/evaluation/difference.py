"""Compare two states on one base, by their weights and their answers (`chainlora.diff`).

The update of a state is a sum of links, so the difference of two updates is one too, and needs only
factors. A link of both states cancels exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from chainlora.chain.link import Factors, Link, stack_links
from chainlora.chain.low_rank import frobenius_norm, numerical_rank, singular_values
from chainlora.data.kept import Kept, need_embedded
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
    max_new_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare two states on one base, of one run or of two.

    Args:
        a: a run, or one of its states (`open_run`).
        b: another one; either may be the base, ``RUN@base``.
        prompts: number of kept rows of each stage that both states answer; by default 3, or all
            rows of `data`. With 0, the base is not loaded.
        data: a file of rows to answer in place of kept rows, read like the rows of `a`.
        max_new_tokens: the most tokens of an answer; by default twice those of the longest right
            one, at least 32.
        progress: called with a description of the current work.

    Returns:
        A mapping with ``modules`` and ``total`` (`weight_difference`), and ``answers`` by stage:
        the numbers of rows that were ``asked`` and answered right (``right_a``, ``right_b``; None
        if unknown), and the answers that ``differ``, each with ``prompt``, ``expected``, ``a`` and
        ``b``.

    Raises:
        ConfigError: `prompts` is negative.
        RunError: states on different bases, or links with a LoRA bias.
    """
    if prompts is not None and prompts < 0:
        raise ConfigError("`prompts` must be 0 or more", prompts, "give 3, for example")
    one, other = open_run(a), open_run(b)
    need_one_base(one, other)
    if prompts != 0 and one.run != other.run:
        need_same_base(one, other)
    result = {"a": str(a), "b": str(b), "base": one.base.model} | weight_difference(one, other)
    sources = _sources(one, other, data, prompts)
    report = progress or (lambda what: None)
    answers = _answers(one, other, sources, max_new_tokens, report) if sources else {}
    return Shown(result | {"answers": answers})


MakeSource = Callable[[Any, Any], Source]
"""Returns rows to answer; called with the tokenizer and the model."""


def _sources(
    a: OpenState, b: OpenState, data: str | Path | None, limit: int | None
) -> list[MakeSource]:
    """Find the rows to answer, of each stage or of a file, before the base is loaded."""
    if limit == 0:
        return []
    if data is not None:
        encode, _ = rows_to_score(a, data=str(data), limit=limit)

        def of_file(tokenizer: Any, model: Any) -> Source:
            task, rows = encode(tokenizer, context_length(model))
            return Source("", rows, task.stop)

        return [of_file]

    def of_kept(source: Source, kept: Kept, _: Any, model: Any) -> Source:
        need_embedded({source.stage: kept}, model)
        return source  # tokenised already

    sources = dict[str, tuple[Source, Kept]]()  # by the SHA-256 of the rows
    for state in (a, b):
        kept = state.kept()
        for name, key in state.columns.items():
            if key in kept and state.keepers[key] not in sources:
                is_taken = name in {source.stage for source, _ in sources.values()}
                stage = f"{name} of {state.run}" if is_taken else name
                rows = kept[key].scored[1][: PROMPTS if limit is None else limit]
                source = Source(stage, rows, kept[key].asked["stop"])
                sources[state.keepers[key]] = source, kept[key]
    return [partial(of_kept, *pair) for pair in sources.values()]


def _answers(
    a: OpenState,
    b: OpenState,
    sources: Sequence[MakeSource],
    max_new_tokens: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Answer rows in both states, on a base that is loaded once; return a comparison by stage."""
    base = OpenBase.of_state(a)
    prompts: list[Prompt] = []
    answers: list[list[Said]] = []
    for state in (a, b):
        report(f"answers of {state}")
        chain, tokenizer = chain_on_base(state, base=base)
        chain.add(*state.links())
        if not prompts:
            rows = [make(tokenizer, chain.model) for make in sources]
            prompts = prompts_of(rows, tokenizer)
            if not prompts:
                rule, remedy = "only rows with prompts can be answered", "give --prompts 0"
                stages = ", ".join(source.stage or "the file" for source in rows)
                raise RunError(rule, f"none in {stages}", remedy)
        answers.append(answer(str(state), chain.model, tokenizer, prompts, max_new_tokens))
    triples = zip(prompts, *answers, strict=True)
    by_stage = groupby(triples, lambda triple: triple[0].stage)
    return {stage: _compared([*of_stage]) for stage, of_stage in by_stage}


def _compared(triples: Sequence[tuple[Prompt, Said, Said]]) -> dict[str, Any]:
    """Return the comparison of both answers to the prompts of a stage."""
    return {
        "asked": len(triples),
        "right_a": _num_right([said for _, said, _ in triples]),
        "right_b": _num_right([said for _, _, said in triples]),
        "differ": [
            {"prompt": prompt.text, "expected": prompt.expected, "a": a.text, "b": b.text}
            for prompt, a, b in triples
            if a.text != b.text
        ],
    }


def _num_right(answers: Sequence[Said]) -> int | None:
    """Return the number of right answers, None if it is not known of any."""
    known = [said.is_right for said in answers if said.is_right is not None]
    return sum(known) if known else None


# --- weights ---


def need_one_base(a: OpenState, b: OpenState) -> None:
    """Raise RunError for states on different bases, or with links that are more than B·A."""
    if a.history.empty.base != b.history.empty.base:
        rule = "states to compare must have the same base"
        got = f"{a} on {a.base.model}, {b} on {b.base.model}, which are different"
        raise RunError(rule, got, "name others")
    for state in (a, b):
        for facts in state.facts:
            need_low_rank_sum(facts.link_config(), state, "name others")


def weight_difference(a: OpenState, b: OpenState) -> dict[str, Any]:
    """Compare the updates of two states, by module and in `total`.

    Each has the Frobenius norms of both updates (`norm_a`, `norm_b`) and of their `difference`,
    which is also given `relative` to the larger norm, and the numerical `rank` of the difference.
    The rank of the total is the largest of a module.
    """
    links = [_links(state) for state in (a, b)]
    updates = [stack_links([*part.values()]) for part in (*links, _difference(*links))]
    names = dict.fromkeys(name for update in updates[:2] for name in update)
    modules = {name: _described(*(update.get(name) for update in updates)) for name in names}
    keys = ("norm_a", "norm_b", "difference")
    norms = {key: math.hypot(*(row[key] for row in modules.values())) for key in keys}
    total = norms | _relative(norms["difference"], [norms["norm_a"], norms["norm_b"]])
    rank = max((row["rank"] for row in modules.values()), default=0)
    return {"modules": modules, "total": total | {"rank": rank}}


def _links(state: OpenState) -> dict[str, Link]:
    """Return the links of a state by their digests."""
    return dict(zip(state.state.links, state.links(), strict=True))


def _difference(a: Mapping[str, Link], b: Mapping[str, Link]) -> dict[str, Link]:
    """Return the links of a − b, by their digests."""
    less = {digest: replace(link, strength=-1.0) for digest, link in b.items() if digest not in a}
    return less | {digest: link for digest, link in a.items() if digest not in b}


def _described(a: Factors | None, b: Factors | None, difference: Factors | None) -> dict[str, Any]:
    """Return the comparison of two updates of a module; None is an update of 0."""
    norms = [0.0 if side is None else frobenius_norm(side.a, side.b) for side in (a, b)]
    row = {"norm_a": norms[0], "norm_b": norms[1]}
    if difference is None:  # both states have the same links
        return row | {"difference": 0.0, "relative": 0.0, "rank": 0}
    s = singular_values(difference.a, difference.b)
    size = max(difference.b.shape[0], difference.a.shape[1])
    return row | _relative(float(s.norm()), norms) | {"rank": numerical_rank(s, size)}


def _relative(difference: float, norms: list[float]) -> dict[str, float]:
    """Return a difference, and its ratio to the larger norm."""
    larger = max(norms)
    return {"difference": difference, "relative": difference / larger if larger else 0.0}
