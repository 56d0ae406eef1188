"""States of a run combined layer by layer (`chain.solving`), on rows that their stages kept; what
the run began on is one more part. Nothing is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from chainlora import files
from chainlora.chain.combining import Combined, Part
from chainlora.chain.link import Link, stack_links, stacked_rank
from chainlora.chain.solving import combine as solve
from chainlora.config.schema import LinkConfig
from chainlora.data.conflicts import newest
from chainlora.data.kept import Kept
from chainlora.errors import ChainError, RunError
from chainlora.evaluation.stage_scores import Progress
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.beginning import fork, need_same_base, take_in
from chainlora.runs.changes import whole_run
from chainlora.runs.export import empty_folder, filled_folder
from chainlora.runs.history import COMBINED, START, History, Recipe, State, Term, Unbuilt
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.links import need_low_rank_sum, save_link
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.paths import is_run
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

ROWS, TOKENS = 64, 16_384  # of each stage, at most
RANK = 16  # of a combination, if no part has more
GENERAL = 4.0  # importance of what the run began on; both were chosen in benchmarks/combining
ON_TOP = "train the stages on top of each other"


def combine(
    run: str | Path,
    names: str | Path | Sequence[str | Path] = (),
    *,
    rank: int | None = None,
    importance: Mapping[str, float] | None = None,
    general: bool = True,
    keep_conflicts: bool = False,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> OpenState:
    """Make a run the combination of some of its states, and of other runs; return that.

    `names` are stages of the run, each with all that it was trained on, and other runs on the same
    base, whose stages are copied into this one. By default they are what the run is combined of, or
    if it is no combination, all stages that no other was trained on. Strengths that a `mix` has set
    are not carried over. With `output` the combination is a new run, and this one stays as it is.

    The combination is one link of a `rank`, by default 16 or the largest of its parts. `importance`
    says by name what the rows of a part count, 1 by default. With `general`, what the run began on
    is a part too, by the rows that were kept for it. With `keep_conflicts`, rows count whose prompt
    has another answer in a later stage.

    Raises RunError for fewer than two parts, for one that another one was trained on, for stages
    that kept no rows, for links that are no low-rank sum, for models that cannot be solved layer by
    layer, and for runs with another base, precision of it or chat template.
    """
    folder = whole_run(run)
    history = read_history(folder)
    names = [names] if isinstance(names, str | Path) else names
    own = [str(name) for name in names if history.find(str(name)) is not None]
    others = [_find_ended(name) for name in names if str(name) not in own]
    ends = history.parts(history.head)
    keys = own or (ends if others or len(ends) > 1 else _stages_of(history))
    states = [state_at(folder, history, key) for key in keys]
    for other in others:
        need_same_base(state_at(folder, history), other)
        states += [other.at(end) for end in other.history.parts(other.key)]
    outer = _outer(states)
    digests = {state.state.digest for state in outer}
    if inner := [state for state in states[: len(own)] if state.state.digest not in digests]:
        rule, remedy = "a combination is of states that no other of them began on", "leave it out"
        raise RunError(rule, f"{inner[0]}", remedy)
    has_general = general and _general_of(history) is not None
    if len(outer) + has_general < 2:
        raise RunError(
            "two states or more are combined; one of them can be what the run began on, with rows",
            ", ".join(map(str, outer)) or "none",
            "add a stage by chainlora extend --beside, or name others",
        )
    need_combinable(outer)
    weights = dict(importance or {})
    _need_weights(weights, {START, *(state.key for state in outer)})
    recipe = Recipe(rank=rank, importance=weights, general=general, keep_conflicts=keep_conflicts)
    if output is None:
        return _become(folder, outer, recipe, progress)
    target = empty_folder(output)
    with filled_folder(target) as scratch:
        fork(outer[0], scratch)
        _become(scratch, outer, recipe, progress)
    return open_run(target)


def _need_weights(importance: Mapping[str, float], parts: Collection[str]) -> None:
    for name, value in importance.items():
        if name not in parts:
            rule = f"importance is given to parts, {', '.join(sorted(parts))}"
            raise RunError(rule, repr(name), "leave it out")
        if not 0 < value < math.inf:
            remedy = "to leave a stage out, name the others"
            raise RunError("an importance is a number above 0", f"{value:g} for {name}", remedy)


def _become(
    run: Path, states: Sequence[OpenState], recipe: Recipe, progress: Progress | None
) -> OpenState:
    """Make a run the combination of states, those of other runs taken in; return that."""
    keys = [state.key if state.run == run else take_in(run, state) for state in states]
    named = {state.key: key for state, key in zip(states, keys, strict=True)}
    weights = {named.get(key, key): value for key, value in recipe.importance.items()}
    recipe = recipe.model_copy(update={"importance": weights})
    before, key = read_history(run), ""

    def change(history: History) -> History:
        nonlocal key
        order = [entry.key for entry in history.entries if entry.key in keys]
        known = history.combination(order, recipe)
        key = history.name_after(order) if known is None else known.key
        unit = known.unit if known is not None else key
        new = Unbuilt(key=key, kind="combine", parents=tuple(order), unit=unit, recipe=recipe)
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
        solved = _solved(states, declared.recipe, progress or (lambda *done: None), base)
    except RunError:  # it would fail again
        update_history(run, lambda now: now.withdrawn([key]))
        raise
    rank = max(each.a.shape[0] for each in solved.factors.values())
    config = LinkConfig(rank=rank, alpha=float(rank))
    link = Link(0, config, solved.factors, error=solved.error)

    def change(now: History) -> History:
        if now.find(key) is not None:
            return now
        here = [now.state_of(name) for name in declared.parents]
        if now.find_unbuilt(key) != declared or here != [state.state for state in states]:
            raise RunError("a run was changed meanwhile", f"{run}", "start again")
        files.remove_scratch(run / "links", COMBINED)  # of a kill: this is done under the lock
        digest, facts = save_link(run, link, now.base, COMBINED)
        state = State(base=now.base.fingerprint, terms=(Term(link=digest),))
        reads = tuple(now.keepers(declared.parents))
        entry = declared.built(state, reads=reads, distances=solved.distances)
        return now.built(entry, {digest: facts})

    update_history(run, change)


def told(history: History, key: str) -> str:
    """Say of a combination its rank, what that left out, and how far it is from each part; of
    another entry nothing."""
    entry = history.find(key)
    if entry is None or entry.kind != "combine":
        return ""
    facts = history.links[entry.state.terms[0].link]
    away = ", ".join(f"{name} {value:.2f}" for name, value in entry.distances.items())
    return f"rank {facts.rank}, error of the rank {facts.error:.2f}; distance to {away}"


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
        if not _with_rows(state):
            rule = "a combination reads rows that stages kept"
            remedy = "train with data.keep_rows: true; chainlora push takes rows along with --rows"
            raise RunError(rule, f"none for {state}", remedy)
        for facts in state.facts:
            need_low_rank_sum(facts.link_config(), state.run, ON_TOP)


def _with_rows(state: OpenState) -> list[str]:
    """Return the entries for whose rows a part answers: all in it that kept some. Those of what the
    run began on are its own part's."""
    return [key for key in state.keepers if (key == START) == (state.key == START)]


def _general_of(history: History) -> str | None:
    """Return the SHA-256 of the rows kept for what a run began on, None where there are none."""
    start = history.find(START)
    return None if start is None else start.kept


def _solved(
    states: Sequence[OpenState], recipe: Recipe, progress: Progress, base: OpenBase | None
) -> Combined:
    """Return the combination of states, with what the run began on unless that is one of them."""
    states = sorted(states, key=lambda each: each.state.digest)  # the sums have this order
    first, history = states[0], states[0].history
    if recipe.general and _general_of(history) and all(each.key != START for each in states):
        states.append(first.at(START))
    links = [state.links() for state in states]
    parts = [
        Part(state.key, own, stack_links(held), _importance(state, recipe))
        for state, own, held in zip(states, _rows_of(states, recipe), links, strict=True)
    ]
    for part in (part for part in parts if not part.rows):
        logger.warning("%s is left out: later stages have other answers to all of it", part.name)
    parts = [part for part in parts if part.rows]
    rank = recipe.rank or max(RANK, *map(stacked_rank, links))
    chain, _ = chain_on_base(first, base=base)
    tell = partial(progress, " + ".join(part.name for part in parts))
    try:
        return solve(chain.model, parts, rank, tell)
    except ChainError as error:
        raise RunError(f"Cannot combine: {error}") from None


def _importance(state: OpenState, recipe: Recipe) -> float:
    return recipe.importance.get(state.key, GENERAL if state.key == START else 1.0)


def _rows_of(states: Sequence[OpenState], recipe: Recipe) -> list[list[list[int]]]:
    """Return token rows for each state: of the stages in it, as many of each, never test rows."""
    kept = states[0].kept([state.key for state in states])
    kept = kept if recipe.keep_conflicts else newest(kept)
    return [[row for key in _with_rows(state) for row in _sample(kept[key])] for state in states]


def _sample(kept: Kept) -> Iterator[list[int]]:
    tokens = 0
    for place, example in enumerate((kept.train or kept.validation).spread(ROWS)):
        (sequence,) = example.right.sequences
        tokens += len(sequence)
        if place and tokens > TOKENS:
            return
        yield [*sequence]
