"""States of a run, trained beside each other, combined in closed form (`chain.combining`) on rows
that their stages kept. Nothing is trained, and no strengths are searched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.combining import Combination, gram_matrices
from chainlora.chain.link import Link
from chainlora.config.staging import is_run
from chainlora.data.kept import Kept
from chainlora.errors import RunError
from chainlora.evaluation.stage_scores import Progress, Scorer
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.beginning import fork, need_same_base, take_in
from chainlora.runs.changes import whole_run
from chainlora.runs.history import BASE, History, State, Term, read_history, update_history
from chainlora.runs.links import save_derived
from chainlora.runs.resuming import refuse_if_taken
from chainlora.runs.state import OpenState

ROWS, TOKENS = 64, 16_384  # of each stage, at most: more change the Grams little
_MEMORY = 1 << 31  # bytes of Grams at once; modules that do not fit wait for another pass

Modules = dict[str, Tensor]  # A by module


def combine(
    run: str | Path,
    names: Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> OpenState:
    """Make a run the combination of some of its states, and of other runs; return that.

    `names` are stages of the run, each with all that it was trained on, and other runs on the same
    base, whose stages are copied into this one. By default they are what the run is combined of, or
    if it is no combination, all stages that no other was trained on. Strengths that a `mix` has set
    are not carried over. With `output` the combination is a new run, and this one stays as it is.

    Raises RunError for fewer than two states, for stages that kept no rows, for links that are no
    low-rank sum, and for runs on another base.
    """
    folder = whole_run(run)
    history = read_history(folder)
    own = [str(name) for name in names if history.find(str(name)) is not None]
    others = [find_ended(name) for name in names if str(name) not in own]
    own = own or (history.ends(history.head) if others else ends_of(history))
    states = [state_at(folder, history, name) for name in own]
    for other in others:
        need_same_base(history, other)
        key = BASE if other.entry is None else other.entry.key
        states += [other.at(end) for end in other.history.ends(key)]
    states = _checked(states)
    if output is not None:
        refuse_if_taken(Path(output).expanduser())
        folder = Path(output).expanduser()
        fork(states[0], folder)
    keys = [s.entry.key if s.run == folder else take_in(folder, s) for s in states if s.entry]
    history = read_history(folder)
    states = [state_at(folder, history, key) for key in keys]
    found = _combined(states, progress or (lambda what, done, rows: None))

    def change(history: History) -> History:
        return history.combined(found, keys)

    history = update_history(folder, change)
    return state_at(folder, history)


def find_ended(address: str | Path) -> OpenState:
    """Return a state of another run. Raises RunError where there is none, or it has not ended."""
    if not is_run(address):
        rule, remedy = (
            "what is combined is a stage of RUN, or another run",
            "chainlora log lists them",
        )
        raise RunError(rule, f"{address}", remedy)
    found = open_run(address)
    if found.draft is not None or not found.has_run or found.is_whole_model:
        rule = "a run that is combined has links, and its stages have ended"
        raise RunError(rule, found.run, "finish it by the command that began it")
    return found


def ends_of(history: History) -> list[str]:
    """Return what a run is combined of, or the stages that no other stage was trained on."""
    found = history.ends(history.head)
    if len(found) > 1:
        return found
    stages = [e for e in history.entries if e.kind in ("stage", "import") and e.state.terms]
    alone = [e for e in stages if history.ends(e.key) == [e.key]]
    below = {a.key for e in alone for a in history.lineage(e.key) if a is not e}
    return [e.key for e in alone if e.key not in below]


def _checked(states: Sequence[OpenState]) -> list[OpenState]:
    """Return states that can be combined, once each."""
    found = {state.state.digest: state for state in states}
    if len(found) < 2:
        raise RunError(
            "two states or more are combined",
            ", ".join(map(str, states)) or "none",
            "add a stage by chainlora extend --beside, or name others",
        )
    for state in found.values():
        if not _rows_of(state):
            rule = "a combination reads rows that stages kept"
            raise RunError(rule, f"none for {state}", "train with data.keep_rows: true")
        for link in state.links():
            _need_low_rank_sum(link, state.run)
    return [*found.values()]


def _combined(states: Sequence[OpenState], progress: Progress) -> State:
    """Return the combination, with its derived factors written into the run."""
    states = sorted(states, key=lambda each: each.state.digest)  # the sums have this order
    first, run = states[0], states[0].run
    links = {
        (term.link, term.derived): link
        for state in states
        for term, link in zip(state.state.terms, state.links(), strict=True)
    }
    held = [{term.link: term for term in state.state.terms} for state in states]
    # A link that is the same in all states stays so.
    alike = {link for link in held[0] if all(each.get(link) == held[0][link] for each in held)}
    inputs = [
        {name: factors.a.shape[1] for name, factors in links[t.link, t.derived].factors.items()}
        for each in held
        for t in each.values()
        if t.link not in alike
    ]
    rows = [_rows_of(state) for state in states]
    parts = list(_parts({name: width for each in inputs for name, width in each.items()}))
    scorer, done, due = Scorer(first, {}), 0, len(parts) * sum(map(len, rows))
    derived: dict[str, Modules] = {}

    def read(tokens: Sequence[Tensor], name: str) -> Iterator[Tensor]:
        nonlocal done
        for row in tokens:
            yield row.to(next(scorer.chain.model.parameters()).device)
            done += 1
            progress(name, done, due)

    for part in parts:
        sums = Combination()
        for state, own, tokens in zip(states, held, rows, strict=True):
            model = scorer.model_at(state.state)
            factors = {
                term.link: _a_of(links[term.link, term.derived], term.strength, part)
                for term in own.values()
                if term.link not in alike
            }
            sums.add(gram_matrices(model, part, read(tokens, str(state))), factors)
        for digest, solved in sums.solve().items():
            derived.setdefault(digest, {}).update(solved)
    order = {term.link: place for each in held for place, term in enumerate(each.values())}
    terms = [
        held[0][link]
        if link in alike
        else Term(link=link, derived=save_derived(run, derived[link]))
        for link in sorted(order, key=lambda each: (first.history.links[each].stage, order[each]))
    ]
    return State(base=first.state.base, terms=tuple(terms))


def _a_of(link: Link, strength: float, modules: Sequence[str]) -> Modules:
    return {name: strength * link.factors[name].a for name in modules if name in link.factors}


def _parts(widths: dict[str, int]) -> Iterator[list[str]]:
    """Divide modules into parts whose Grams, of a state and summed, fit into memory."""
    part: list[str] = []
    size = 0
    for name, width in widths.items():
        more = 2 * 8 * width**2
        if part and size + more > _MEMORY:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    if part:
        yield part


def _need_low_rank_sum(link: Link, run: Path) -> None:
    factors = link.factors.values()
    kinds = {
        "DoRA": any(each.magnitude is not None for each in factors),
        "a bias of LoRA": any(each.bias is not None for each in factors),
        "modules trained whole": bool(link.extra),
    }
    if found := [name for name, is_there in kinds.items() if is_there]:
        raise RunError(
            "only links that are low-rank sums are combined",
            f"{found[0]} in {run}",
            "train the stages on top of each other",
        )


def _rows_of(state: OpenState) -> list[Tensor]:
    """Return token rows (1 × length) of the stages of a state, as many of each: never test rows."""
    return [row for kept in state.kept().values() for row in _sample(kept)]


def _sample(kept: Kept) -> Iterator[Tensor]:
    rows: Any = kept.train or kept.validation
    count, tokens = min(ROWS, len(rows)), 0
    for place in range(count):
        (example,) = rows[place * len(rows) // count : place * len(rows) // count + 1]
        sequence = example.sequences[example.label or 0]
        tokens += len(sequence)
        if place and tokens > TOKENS:
            return
        yield torch.tensor([sequence[:-1] or sequence], dtype=torch.long)
