"""Combine states of a run layer by layer (`chain.solving`), on kept rows of their stages.

Only `How.steps` train. The origin is one more part, if it has kept rows (decision 36).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.chain.combining import Combined, Part
from chainlora.chain.link import stack_links
from chainlora.chain.solving import combine as solve
from chainlora.data.kept import Kept, need_embedded, newest
from chainlora.data.rows import MemoryRows, joined
from chainlora.errors import ChainError, RunError
from chainlora.evaluation.combined_steps import POINT, Lessons, Point, trained
from chainlora.evaluation.stage_scores import Progress
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.beginning import need_same_base, take_in
from chainlora.runs.documents import short_digest
from chainlora.runs.entries import COMBINED, START, Due, State
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.keys import Made
from chainlora.runs.links import need_low_rank_sum, save_link
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.paths import is_run, stage_folder
from chainlora.runs.recipes import How
from chainlora.runs.saved_chain import as_adapter
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

ROWS, TOKENS = 64, 16_384  # the most rows and tokens of each stage
# both chosen in benchmarks/combining
RANK = 16  # of a combination, if the ranks of its links have no larger sum
GENERAL = 4.0  # importance of the origin
ON_TOP = "train it on top of the others, by --on-top or beside: false"


def edited(
    run: Path,
    history: History,
    names: str | Path | Sequence[str | Path] = (),
    *,
    rank: int | None = None,
    importance: Mapping[str, float] | None = None,
    general: bool = True,
    keep_conflicts: bool = False,
    steps: int = 0,
) -> History:
    """Return the history of a run that is a combination; stages of other runs are copied into it.

    The arguments are those of `training.stages.combine`. Raises RunError for what it refuses.
    """
    given = _parts(run, history, [names] if isinstance(names, str | Path) else names)
    parts = [state for state, _ in given]
    with_origin = general and has_general(state_at(run, history))
    if len(parts) + with_origin < 2:
        raise RunError(
            "a combination needs two parts or more; the origin counts if it has rows",
            ", ".join(map(str, parts)) or "none",
            "add a stage by chainlora extend --beside, or name others",
        )
    need_combinable(parts)
    if rank is not None and rank < 1:
        remedy = "give another one, or leave it out"
        raise RunError("the rank of a combination must be above 0", rank, remedy)
    weights = _checked_weights(importance or {}, [its for _, its in given], with_origin)
    if steps < 0:
        raise RunError("the steps of a combination must be 0 or more", steps, "leave them out")
    keys, taken = list[str](), list[int]()
    for state in parts:
        key = state.key
        if state.run != run:
            history, key = take_in(run, history, state)
            taken.append(history.at)
        keys.append(key)
    pairs = zip((*keys, START), weights, strict=True)
    known = {key: weight for key, weight in pairs if weight is not None}
    own: Any = {"rank": rank, "importance": known, "general": general, "steps": steps}
    how = How(keep_conflicts=keep_conflicts, always=len(parts) < 2, **own)
    after = history.edited(history.plan_of(keys, how), "combine")
    if made := [r for r in after.recipes().root.lineage if not Made(after).is_made(r)]:
        rule = "runs must share the rows of their base that stages read again (data.replay)"
        raise RunError(rule, f"others for {made[0].stage and made[0].stage.name}", "leave it out")
    return after


def _parts(
    folder: Path, history: History, names: Sequence[str | Path]
) -> list[tuple[OpenState, list[str]]]:
    """Return the states to combine, each with the names by which its importance can be given.

    They are states of the run in `folder` and of other runs.
    """
    keys = [str(name) for name in names if history.find(str(name)) is not None]
    others = {str(name): _other_run(name) for name in names if str(name) not in keys}
    default = history.parts(history.head)
    if not others and len(default) < 2:
        in_plan = [name for name in history.plan().names if history.state_of(name).links]
        default = history.plan().parts(in_plan)
    own = keys or default
    found = [(state_at(folder, history, key), [key]) for key in own]
    for name, other in others.items():
        need_same_base(state_at(folder, history), other)
        for part in other.history.parts(other.key):
            found.append((other.at(part), [name] if part in (*own, START) else [name, part]))
    parts = _without_ancestors([state for state, _ in found])
    digests = {state.state.digest for state in parts}
    if below := [state for state, _ in found[: len(keys)] if state.state.digest not in digests]:
        rule = "Cannot combine a state with one that was trained on it"
        raise RunError(rule, f"{below[0]}", "leave it out")
    names_of: dict[str, list[str]] = {}
    for state, its in found:  # equal states are one part
        names_of.setdefault(state.state.digest, []).extend(its)
    return [(state, names_of[state.state.digest]) for state in parts]


def _checked_weights(
    importance: Mapping[str, float], names: Sequence[Sequence[str]], with_origin: bool
) -> list[float | None]:
    """Return the importance of each part, by the first of its names that has one, then the start's.

    Raises RunError for an importance of an unknown part, or one that is not positive.
    """
    known = {*([START] if with_origin else []), *(name for its in names for name in its)}
    for name, value in importance.items():
        if name not in known:
            rule = f"importance is given to parts, {', '.join(sorted(known))}"
            raise RunError(rule, repr(name), "leave it out")
        if not 0 < value < math.inf:
            remedy = "to leave a stage out, name the others"
            raise RunError("an importance is a number above 0", f"{value:g} for {name}", remedy)
    named = (next(filter(importance.__contains__, its), None) for its in (*names, [START]))
    return [None if name is None else importance[name] for name in named]


def build_combination(
    run: Path, due: Due, progress: Progress | None = None, base: OpenBase | None = None
) -> None:
    """Solve a combination, save its link, and write its entry."""
    history, recipe = read_history(run), due.recipe
    how, began = recipe.how or How(), time.monotonic()
    # sorted: the order of summation, and so the bits, must not depend on the order of names
    states = [state_at(run, history, name) for name in due.parents]
    states = sorted(states, key=lambda state: state.state.digest)
    progress = progress or (lambda *done: None)
    folder = stage_folder(run, due.place)  # has a point while the steps are not finished
    save, point = None, None
    if how.steps:
        save = partial(Point.write, path=folder / POINT, identity=due.digest)
        point = Point.read(folder / POINT, due.digest)
    if point is None:
        point = Point.of(_solved(states, how, progress, base))
    if save is not None:
        save(point)
        point = _trained(states, how, point, save, progress, base)
    link = point.link()
    files.remove_scratch(run / "links", COMBINED)  # left by a kill; the run is held
    digest, facts = save_link(run, link, history.base, COMBINED)
    state = State(base=history.base.fingerprint, links=(digest,))
    seconds = round(time.monotonic() - began, 1)
    entry = due.entry(state, distances=dict(point.distances), seconds=seconds)
    update_history(run, lambda now: now.added(entry, {digest: facts}))
    files.remove(folder)


def summary_of(history: History, key: str) -> str:
    """Return a line about a combination with its distances from the parts, else ""."""
    entry = history.find(key)
    if entry is None or entry.kind != "combine":
        return ""
    facts = history.links[entry.state.links[0]]
    distances = ", ".join(f"{name} {value:.2f}" for name, value in entry.distances.items())
    return f"rank {facts.rank}, error of the rank {facts.error:.2f}; distance to {distances}"


def _other_run(address: str | Path) -> OpenState:
    """Return a state of another run. Raises RunError for no run, or an unfinished one."""
    if not is_run(address):
        rule = "a part must be a stage of RUN, or another run"
        raise RunError(rule, address, "chainlora log RUN lists its stages")
    state = open_run(address)
    if state.draft is not None or not state.has_run:
        rule = "only a run with a finished stage can be combined"
        unfinished = "finish its stage: repeat the command that began it"
        raise RunError(rule, state.run, unfinished if state.has_run else as_adapter(state.run))
    return state


def _without_ancestors(states: Sequence[OpenState]) -> list[OpenState]:
    """Return the states once each, without states that another one was trained on."""
    below = {e.state.digest for s in states for e in s.lineage if e is not s.entry}
    unique: dict[str, OpenState] = {}
    for state in states:
        if state.state.digest not in below:
            unique.setdefault(state.state.digest, state)
    return [*unique.values()]


def need_combinable(states: Sequence[OpenState]) -> None:
    """Raise RunError for states without kept rows, or with links that are not low-rank sums."""
    for state in states:
        if not _entries_with_rows(state):
            rule = "a combination reads kept rows of its parts"
            remedy = "train with data.keep_rows: true; chainlora push sends rows with --rows"
            raise RunError(rule, f"none for {state}", remedy)
        for facts in state.facts:
            need_low_rank_sum(facts.link_config(), state.run, ON_TOP)


def _entries_with_rows(state: OpenState) -> list[str]:
    """Return the entries whose kept rows a part is solved on."""
    # rows of an origin belong to it: that of this run is a part of its own
    return [key for key in state.keepers if _is_origin(state, key) == _is_origin(state, state.key)]


def _is_origin(state: OpenState, key: str) -> bool:
    """Say whether an entry is what a run began on: of this run, or of one that was taken in."""
    entry = state.history.find(key)
    return entry is not None and entry.kind == "import" and not entry.has_config


def has_general(state: OpenState) -> bool:
    """Return whether a combination can read rows of the origin: its training rows."""
    start = state.history.find(START)
    return start is not None and start.kept is not None and bool(state.kept()[START].train)


def _solved(
    states: Sequence[OpenState], recipe: How, progress: Progress, base: OpenBase | None
) -> Combined:
    """Return the closed form for states, and for the origin if the recipe asks for it."""
    first, history = states[0], states[0].history
    if _adds_origin(states, recipe):
        states = [*states, first.at(START)]
    links = [state.links() for state in states]
    weights = {START: GENERAL} | recipe.importance
    kept = first.kept([state.key for state in states])
    parts = []
    for state, rows, of_state in zip(states, _rows_of(states, kept, recipe), links, strict=True):
        if rows:
            weight = weights.get(state.key, 1.0)
            parts.append(Part(state.key, rows, stack_links(of_state), weight))
        else:
            reason = "it has no training rows, or later stages answer all their prompts otherwise"
            logger.warning("%s is left out of the combination: %s", state.key, reason)
    ranks = {link: history.links[link].rank for s in states for link in s.state.links}
    rank = recipe.rank or max(RANK, sum(ranks.values()))
    chain, _ = chain_on_base(first, base=base)
    need_embedded(kept, chain.model)
    report = partial(progress, f"{' + '.join(part.name for part in parts)}: layer")
    try:
        return solve(chain.model, parts, rank, report)
    except ChainError as error:
        raise RunError(f"Cannot combine: {error}") from None


def _adds_origin(states: Sequence[OpenState], recipe: How) -> bool:
    """Say whether the origin is one more part."""
    start = states[0].history.find(START)
    has_rows = start is not None and start.kept is not None
    return recipe.general and has_rows and all(state.key != START for state in states)


def _trained(
    states: Sequence[OpenState],
    recipe: How,
    point: Point,
    save: Callable[[Point], None],
    progress: Progress,
    base: OpenBase | None,
) -> Point:
    """Train the closed form on the kept rows of the states; the origin is the teacher."""
    first, adds_origin = states[0], _adds_origin(states, recipe)
    kept = first.kept([state.key for state in states])
    kept = kept if recipe.keep_conflicts else newest(kept)
    entries = [[kept[key] for key in _entries_with_rows(state)] for state in states]
    pools = [joined([each.train or each.validation for each in of_state]) for of_state in entries]
    chain, _ = chain_on_base(first, base=base)
    need_embedded(kept, chain.model)
    lessons = Lessons(
        rows=[pool for pool in pools if pool],
        general=kept[START].train if adds_origin else MemoryRows(),
        steps=recipe.steps,
        seed=int(short_digest([state.state.digest for state in states])[:8], 16),
    )
    start = first.at(START).links() if adds_origin else []
    report = partial(progress, f"{' + '.join(state.key for state in states)}: step")
    return trained(chain, start, point, lessons, save, report)


def _rows_of(
    states: Sequence[OpenState], kept: Mapping[str, Kept], recipe: How
) -> list[list[list[int]]]:
    """Return the token rows of each state: a sample of each of its stages, never test rows."""
    kept = kept if recipe.keep_conflicts else newest(kept)
    return [
        [
            row
            for key in _entries_with_rows(state)
            for row in _sample(kept[key], _is_origin(state, key))
        ]
        for state in states
    ]


def tokens_read(kept: Mapping[str, Kept]) -> int:
    """Return the number of tokens that a combination of these entries reads."""
    return sum(len(row) for key, rows in kept.items() for row in _sample(rows, key == START))


def _sample(kept: Kept, is_start: bool) -> Iterator[list[int]]:
    """Yield up to `ROWS` rows with up to `TOKENS` tokens, at least one row.

    Validation rows stand in for missing training rows of a stage. Those of the start do not: they
    measure what a combination does to the base.
    """
    tokens, rows = 0, kept.train if is_start or kept.train else kept.validation
    for place, example in enumerate(rows.spread(ROWS)):
        (sequence,) = example.right.sequences
        tokens += len(sequence)
        if place and tokens > TOKENS:
            return
        yield [*sequence]
