"""The stages of a run on its base, each at a strength of one's own, heard and scored.

The base is loaded when it is first needed. Links are carried beside it, so that another mix takes
a tenth of a second and no byte of the run changes; a mix is the same function as what `mix_stages`
makes the run be, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

from chainlora.config.staging import split_address
from chainlora.errors import RunError
from chainlora.evaluation.generation import Decoding, Message, Speaker
from chainlora.evaluation.stage_scores import Cell, Scorer
from chainlora.evaluation.training_rows import RowFacts, training_rows
from chainlora.models.finding import resolve_model
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import mix_stages
from chainlora.runs.export import export_adapter, export_merged
from chainlora.runs.opening import tokenizer_of

EXPORTS = {"adapter": export_adapter, "merged": export_merged}


Mix = dict[str, float]
"""The strength of each stage."""


class Desk:
    """One run, the mixes that somebody tries, and the model that answers in each of them.

    Raises RunError for a run that has no links, or none yet.
    """

    def __init__(self, run: str | Path) -> None:
        self.run, _ = split_address(run)
        self.state = open_run(self.run)
        if not self.state.facts:
            remedy = "wait for a knot" if self.state.draft is not None else "choose another run"
            raise RunError("there must be links to mix", f"none in {run}", remedy)
        self.what = (self.run, [term.link for term in self.state.state.terms])
        self._one_at_a_time = Lock()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the rows of the run had."""
        return tokenizer_of(self.state, resolve_model(self.state.base.model))

    @cached_property
    def rows(self) -> RowFacts | None:
        """What the training rows that the stages kept have in common."""
        return training_rows(self.state, self.tokenizer)

    def prompts(self, count: int) -> list[str]:
        """Return the first prompts that each stage kept; none of a run that keeps no rows."""
        rows = [row for kept in self.state.kept().values() for row in kept.scored[1][:count]]
        texts = [self.tokenizer.decode(row.prompt, skip_special_tokens=True) for row in rows]
        return list(dict.fromkeys(text for text in texts if text))

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.state, self.state.kept(), hold="carried")

    def release(self) -> None:
        """Let go of the model; it is loaded again when it is needed."""
        vars(self).pop("_scorer", None)

    def answer(
        self, mix: Mix, turns: Sequence[Message], decoding: Decoding, *, as_chat: bool
    ) -> Iterator[str]:
        """Yield what a mix has answered so far, again and again; the last time it is whole.

        `turns` end in the question. As a chat they go through the model's template; else the
        question alone is continued, as `chainlora generate` does. Where the iterator is closed, the
        model stops.
        """
        with self._one_at_a_time:
            model = self._scorer.model_at(self.state.with_strengths(mix).state)
            speaker = Speaker(model, self.tokenizer, decoding)

            def speak(write: Callable[[str], None]) -> str:
                if as_chat:
                    return speaker.answer(turns, write)
                return speaker.complete(turns[-1]["content"], write)

            yield from _growing(speak)

    def scores(self, mixes: Sequence[Mix]) -> list[list[Cell]]:
        """Score the rows that each stage kept in each mix: a row of the matrix a mix.

        Raises RunError for a run that kept none.
        """
        with self._one_at_a_time:
            scorer = self._scorer
            names = {stage: name for name, stage in self.state.columns.items()}
            stages = [stage for stage in names if stage in scorer.kept]
            if not stages:
                rule = "a mix is scored on the rows that stages kept"
                raise RunError(rule, f"none in {self.run}", "train with data.keep_rows: true")
            states = [self.state.with_strengths(mix).state for mix in mixes]
            found = [scorer.score("mix", state, stages) for state in states]
            return [[replace(cell, stage=names[cell.stage]) for cell in row] for row in found]

    def save(self, mix: Mix) -> None:
        """Make the run this mix, as `chainlora mix` does."""
        mix_stages(self.run, mix)

    def export(self, mix: Mix, output: str | Path, to: str) -> dict[str, Any]:
        """Write this mix, as `chainlora export --stages` does; the run stays what it is."""
        return EXPORTS[to](open_run(self.run, mix), output)


def _growing(speak: Callable[[Callable[[str], None]], str]) -> Iterator[str]:
    """Yield a text as `speak` writes it, in a thread of its own."""
    pieces: SimpleQueue[str | None] = SimpleQueue()
    left = Event()

    def write(piece: str) -> None:
        if left.is_set():
            raise BrokenPipeError("nobody listens any more")
        pieces.put(piece)

    text = ""
    with ThreadPoolExecutor(1) as pool:
        try:
            done = pool.submit(speak, write)
            done.add_done_callback(lambda _: pieces.put(None))
            while (piece := pieces.get()) is not None:
                text += piece
                yield text
            yield done.result()  # or what it raised
        finally:
            left.set()
