"""How many of its trained rows a run answers exactly: what a user asks first after training."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from chainlora.config.schema import PAIR_LOSSES
from chainlora.evaluation.answers import Source, answer, prompts_of
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.entries import START
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base

ROWS = 20  # the most of each stage; the same rows each time


class Answered(NamedTuple):
    """The numbers of rows that were asked and answered right."""

    asked: int
    right: int


def right_answers(
    run: Address, stages: Collection[str] | None = None, *, base: OpenBase | None = None
) -> dict[str, Answered]:
    """Ask a run the prompts of trained rows that its stages kept, and count the exact answers.

    Args:
        run: a run, or one of its states.
        stages: the stages whose rows are asked; by default all.
        base: the base, if it is open already.

    Returns:
        The numbers by stage; a stage of plain texts or preference pairs has none.
    """
    state = open_run(run)
    sources = [
        Source(key, each.train[:ROWS], each.asked["stop"])
        for key, each in state.kept().items()
        if key != START and each.loss not in PAIR_LOSSES and (stages is None or key in stages)
    ]
    if not sources:
        return {}
    chain, tokenizer = chain_on_base(state, base=base)
    chain.add(*state.links())
    prompts = prompts_of(sources, tokenizer)
    answers = answer(str(state), chain.model, tokenizer, prompts, None)
    counts = dict[str, Answered]()
    for prompt, said in zip(prompts, answers, strict=True):
        if said.is_right is not None:
            asked, right = counts.get(prompt.stage, Answered(0, 0))
            counts[prompt.stage] = Answered(asked + 1, right + said.is_right)
    return counts


class Compared(NamedTuple):
    """A stage in two runs: its exact answers, and the score of its kept rows in both matrices."""

    stage: str
    before: Answered | None
    now: Answered | None
    score_before: float | None
    score_now: float | None

    def texts(self) -> tuple[str, ...]:
        """Return the values as text."""
        right = ["–" if a is None else f"{a.right} of {a.asked}" for a in (self.before, self.now)]
        scores = (self.score_before, self.score_now)
        return (self.stage, *right, *("–" if s is None else f"{s:.4f}" for s in scores))


def compared(before: Address, now: Address) -> list[Compared]:
    """Compare the current states of two runs by stage."""
    right_before, right = map(right_answers, (before, now))
    score_before, score = map(_scores, (before, now))
    return [
        Compared(s, right_before.get(s), right.get(s), score_before.get(s), score.get(s))
        for s in open_run(now).columns
    ]


def _scores(run: Address) -> dict[str, float]:
    """Return the saved scores of the rows of each stage in the current state."""
    matrix = stage_matrix(run, compute=False)
    return {cell.stage: cell.value for cell in matrix.grid[-1] if cell is not None}
