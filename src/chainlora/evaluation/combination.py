"""States of a run, trained beside each other, combined in closed form (`chain.combining`) on rows
that their stages kept. Nothing is trained, and no strengths are searched."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from chainlora.chain.chain import Chain
from chainlora.chain.combining import Combination, gram_matrices, modules_by_input
from chainlora.chain.link import Factors, Link, with_a
from chainlora.config.staging import is_run
from chainlora.data.kept import Kept
from chainlora.errors import ChainError, RunError
from chainlora.evaluation.stage_scores import Progress
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.beginning import fork, need_same_base, take_in
from chainlora.runs.changes import whole_run
from chainlora.runs.export import empty_folder, filled_folder
from chainlora.runs.history import History, State, Term, Unbuilt
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.links import need_low_rank_sum, save_derived
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

ROWS, TOKENS = 64, 4_096  # of each stage, at most: more change the Grams little
FEWER = 4  # times fewer rows show the first pass what the second one needs
ON_TOP = "train the stages on top of each other"
_MEMORY = 1 << 31  # bytes of Grams at once; modules that do not fit wait for another pass

Modules = dict[str, Tensor]  # A by module


def combine(
    run: str | Path,
    names: str | Path | Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> OpenState:
    """Make a run the combination of some of its states, and of other runs; return that.

    `names` are stages of the run, each with all that it was trained on, and other runs on the same
    base, whose stages are copied into this one. By default they are what the run is combined of, or
    if it is no combination, all stages that no other was trained on. Strengths that a `mix` has set
    are not carried over. With `output` the combination is a new run, and this one stays as it is.

    Raises RunError for fewer than two states, for one that another one was trained on, for stages
    that kept no rows, for links that are no low-rank sum, and for runs with another base, precision
    of it or chat template.
    """
    folder = whole_run(run)
    history = read_history(folder)
    names = [names] if isinstance(names, str | Path) else names
    own = [str(name) for name in names if history.find(str(name)) is not None]
    others = [_find_ended(name) for name in names if str(name) not in own]
    ends = history.ends(history.head)
    keys = own or (ends if others or len(ends) > 1 else _stages_of(history))
    states = [state_at(folder, history, key) for key in keys]
    for other in others:
        need_same_base(state_at(folder, history), other)
        states += [other.at(end) for end in other.history.ends(other.key)]
    outer = _outer(states)
    digests = {state.state.digest for state in outer}
    if inner := [state for state in states[: len(own)] if state.state.digest not in digests]:
        rule, remedy = "a combination is of states that no other of them began on", "leave it out"
        raise RunError(rule, f"{inner[0]}", remedy)
    if len(outer) < 2:
        raise RunError(
            "two states or more are combined",
            ", ".join(map(str, outer)) or "none",
            "add a stage by chainlora extend --beside, or name others",
        )
    need_combinable(outer)
    if output is None:
        return _become(folder, outer, progress)
    target = empty_folder(output)
    with filled_folder(target) as scratch:
        fork(outer[0], scratch)
        _become(scratch, outer, progress)
    return open_run(target)


def _become(run: Path, states: Sequence[OpenState], progress: Progress | None) -> OpenState:
    """Make a run the combination of states, those of other runs taken in; return that."""
    keys = [state.key if state.run == run else take_in(run, state) for state in states]
    before, key = read_history(run), ""

    def change(history: History) -> History:
        nonlocal key
        order = [entry.key for entry in history.entries if entry.key in keys]
        known = history.combination(order)
        key = history.name_after(order) if known is None else known.key
        unit = known.unit if known is not None else key
        new = Unbuilt(key=key, kind="combine", parents=tuple(order), unit=unit)
        return history.declared([new] if known is None else [], key)

    history = update_history(run, change)
    if history.find(key) is None:
        build_combination(run, key, progress)
    tell_left_out(run, before, key)
    return open_run(run)


def build_combination(
    run: Path, key: str, progress: Progress | None = None, base: OpenBase | None = None
) -> None:
    """Solve a combination that was declared, and give its entry its state.

    Raises RunError where it is not declared any more, or what it is of has changed.
    """
    history = read_history(run)
    declared = history.find_unbuilt(key)
    if declared is None:  # another process was faster
        return
    states = [state_at(run, history, name) for name in declared.parents]
    try:
        solved = _solved(states, progress or (lambda *done: None), base)
    except RunError:  # it would fail again
        update_history(run, lambda now: now.withdrawn([key]))
        raise

    def change(now: History) -> History:
        if now.find(key) is not None:
            return now
        here = [now.state_of(name) for name in declared.parents]
        if now.find_unbuilt(key) != declared or here != [state.state for state in states]:
            raise RunError("a run was changed meanwhile", f"{run}", "start again")
        terms = tuple(
            Term(link=link, derived=save_derived(run, a)) if isinstance(a, dict) else a
            for link, a in solved.items()
        )
        state = State(base=now.base.fingerprint, terms=terms)
        return now.built(declared.built(state, reads=tuple(now.keepers(declared.parents))), {})

    update_history(run, change)


def tell_left_out(run: Path, before: History, key: str, *, rehearsals: bool = True) -> None:
    """Warn of what a run was, and what it has become is not made of: a mix, or a rehearsal."""
    inside = read_history(run).below(key)
    left = [entry for entry in before.lineage(before.head) if entry.key not in inside]
    told = [e.key for e in left if e.kind == "mix" or (rehearsals and e.is_rehearsal)]
    if told:
        logger.warning("%s was %s, which is not in the combination", run, told[-1])


def _find_ended(address: str | Path) -> OpenState:
    """Return a state of another run. Raises RunError where there is none, or it has not ended."""
    if not is_run(address):
        rule = "what is combined is a stage of RUN, or another run"
        raise RunError(rule, address, "chainlora log RUN lists its stages")
    found = open_run(address)
    if found.draft is not None or not found.has_run:
        rule = "a run that is combined has links, and its stages have ended"
        raise RunError(rule, found.run, "finish it by the command that began it")
    return found


def _stages_of(history: History) -> list[str]:
    """Return the stages of a run, and imported adapters, that can be parts of a combination."""
    found = (e for e in history.entries if e.kind in ("stage", "import") and e.state.terms)
    return [entry.key for entry in found if not entry.is_rehearsal]


def _outer(states: Sequence[OpenState]) -> list[OpenState]:
    """Return the states that no other one was trained on, once each."""
    below = {e.state.digest for s in states for e in s.lineage if e is not s.entry}
    found: dict[str, OpenState] = {}
    for state in states:
        if state.state.digest not in below:
            found.setdefault(state.state.digest, state)
    return [*found.values()]


def need_combinable(states: Sequence[OpenState]) -> None:
    """Raise RunError for a state that cannot be combined with others."""
    for state in states:
        if not state.keepers:
            rule = "a combination reads rows that stages kept"
            remedy = "train with data.keep_rows: true; chainlora push takes rows along with --rows"
            raise RunError(rule, f"none for {state}", remedy)
        for facts in state.facts:
            need_low_rank_sum(facts.link_config(), state.run, ON_TOP)


def _solved(
    states: Sequence[OpenState], progress: Progress, base: OpenBase | None
) -> dict[str, Modules | Term]:
    """Return the A of each link of a combination, in their order; the term of one alike in all."""
    states = sorted(states, key=lambda each: each.state.digest)  # the sums have this order
    terms = [{term.link: term for term in state.state.terms} for state in states]
    alike = {key: term for key, term in terms[0].items() if all(e.get(key) == term for e in terms)}
    held = [dict(zip(own, e.links(), strict=True)) for own, e in zip(terms, states, strict=True)]
    links = {key: link for own in held for key, link in own.items()}
    facts, place = states[0].history.links, {k: n for own in held for n, k in enumerate(own)}
    order = sorted(links, key=lambda each: (facts[each].stage, place[each]))
    new = [{k: link for k, link in own.items() if k not in alike} for own in held]
    chain, _ = chain_on_base(states[0], base=base)
    device = next(chain.model.parameters()).device
    rows = [_rows_of(state) for state in states]
    changed = [links[key].factors for key in order if key not in alike]
    shapes = {name: each for factors in changed for name, each in factors.items()}
    by_input = modules_by_input(chain.model, shapes, rows[0][0][:, :16].to(device))
    parts = list(_parts(by_input, shapes))
    passes = [own[::FEWER] for own in rows], rows
    done, due = 0, len(parts) * sum(len(own) for some in passes for own in some)

    def read(tokens: Sequence[Tensor], name: str) -> Iterator[Tensor]:
        nonlocal done
        for row in tokens:
            yield row.to(device)
            done += 1
            progress(name, done, due)

    models = [[*own.values()] for own in held]
    for some in passes:
        derived: dict[str, Modules] = {}
        for part in parts:
            sums = [Combination() for _ in part]
            firsts = [names[0] for names in part]
            for state, own, model, tokens in zip(states, new, models, some, strict=True):
                _put(chain, model)
                try:
                    grams = gram_matrices(chain.model, firsts, read(tokens, state.stage))
                except ChainError as error:
                    rule = "states that are combined must have finite activations"
                    raise RunError(rule, f"{error}, {state}", "leave it out") from None
                for each, names in zip(sums, part, strict=True):
                    pairs = [(key, n) for key in own for n in names if n in own[key].factors]
                    factors = {(k, n): own[k].strength * own[k].factors[n].a for k, n in pairs}
                    each.add(grams.get(names[0]), factors)
            for each in sums:
                for (key, module), a in each.solve().items():
                    derived.setdefault(key, {})[module] = a
        found = {key: replace(with_a(links[key], a), strength=1.0) for key, a in derived.items()}
        models = [[found.get(key, links[key]) for key in order]] * len(states)
    return {key: alike[key] if key in alike else derived[key] for key in order}


def _put(chain: Chain, links: Sequence[Link]) -> None:
    """Give a chain other links; without LoRA layers, where they are merged, which add nothing."""
    chain.drop(len(chain))
    chain.add(*(replace(link, index=place, id=place) for place, link in enumerate(links)))
    if chain.hold == "tied":
        chain.detach()


def _parts(
    by_input: Iterable[list[str]], factors: Mapping[str, Factors]
) -> Iterator[list[list[str]]]:
    """Divide modules that share an input into parts whose Grams fit into memory, also summed."""
    part: list[list[str]] = []
    size = 0
    for names in by_input:
        more = 2 * 8 * factors[names[0]].a.shape[1] ** 2
        if part and size + more > _MEMORY:
            yield part
            part, size = [], 0
        part.append(names)
        size += more
    if part:
        yield part


def _rows_of(state: OpenState) -> list[Tensor]:
    """Return token rows (1 × length) of the stages of a state, as many of each: never test rows."""
    return [row for kept in state.kept().values() for row in _sample(kept)]


def _sample(kept: Kept) -> Iterator[Tensor]:
    tokens = 0
    for place, example in enumerate((kept.train or kept.validation).spread(ROWS)):
        (sequence,) = example.right.sequences
        tokens += len(sequence)
        if place and tokens > TOKENS:
            return
        yield torch.tensor([sequence[:-1] or sequence], dtype=torch.long)
