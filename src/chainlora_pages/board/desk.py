"""Ask the states of a run.

The base is loaded when it is first needed. Links are carried beside it, so that changing the state
takes a tenth of a second and no file of the run changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from chainlora.data.examples import Example
from chainlora.errors import RunError
from chainlora.evaluation.answers import Source, answer, prompts_of
from chainlora.evaluation.generation import Decoding, Message, Speaker
from chainlora.evaluation.stage_scores import Scorer
from chainlora.evaluation.training_rows import RowFacts, training_rows
from chainlora.models.finding import resolve_model
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import earlier_of, later_of, undo
from chainlora.runs.entries import BASE, START
from chainlora.runs.exported import exporter_to
from chainlora.runs.history import History
from chainlora.runs.opening import tokenizer_of
from chainlora.runs.paths import split_address
from chainlora.runs.state import OpenState
from chainlora_pages.page import Answer

MOST_ASKED = 20  # rows: each state answers them in seconds to a minute


def in_use(history: History, key: str) -> str:
    """Return the stages of an entry in one line."""
    return " + ".join(history.stages_of(key)) or BASE


def added(history: History, before: str, after: str) -> str:
    """Return the stages of entry `after` that entry `before` does not have, in one line."""
    known = history.stages_of(before)
    return " + ".join(stage for stage in history.stages_of(after) if stage not in known)


class Desk:
    """One run, its states, and the model that answers in each of them.

    Raises RunError for a run without links.
    """

    def __init__(self, run: str | Path) -> None:
        self.run, _ = split_address(run)
        self.now = _or_base(open_run(self.run))
        history = self.now.history
        if not history.links:
            remedy = "wait for a knot" if self.now.draft is not None else "choose another run"
            raise RunError("a run needs links before it can be asked", f"none in {run}", remedy)
        self.what = (self.run, [*history.links])  # identifies the run and its links
        self._one_at_a_time = Lock()

    @property
    def history(self) -> History:
        """Return the history of the run, including a first stage that has not ended."""
        return self.now.history

    @property
    def state(self) -> OpenState:
        """Return the state whose rows are scored: the current one; for the base, the last entry."""
        return self.now if self.now.facts else self.now.at(self.history.entries[-1].key)

    def look_again(self, now: OpenState) -> None:
        """Update the current state of the run; its links must be the same."""
        with self._one_at_a_time:
            self.now = now
            if "_scorer" in vars(self):
                self._scorer.run, self._scorer.kept = self.state, self.state.kept()

    @property
    def entries(self) -> dict[str, str]:
        """Return labels of the entries of the history, the latest first, and then the base."""
        entries = reversed(self.history.entries)  # an entry without links equals the base
        keys = [*(entry.key for entry in entries if entry.state.links), BASE]
        texts = {key: self.words(key) for key in keys}
        marks = {self.now.key: "now: "}
        if self.now.key != BASE:
            marks[self.before] = "before: "
        return {marks.get(key, "") + text: key for key, text in texts.items()}

    def words(self, key: str) -> str:
        """Return the name of an entry, and the stages in it."""
        stages = self.history.stages_of(key)
        return key if stages in ([], [key]) else f"{key} ({' + '.join(stages)})"

    @property
    def before(self) -> str:
        """Return the entry that `undo` goes to; if the run is at its base, the entry of `redo`."""
        if self.now.key == BASE:
            return next(iter(later_of(self.history)), self.history.entries[-1].key)
        earlier = [*earlier_of(self.history)]
        return _or_base(self.now.at(earlier[0])).key if earlier else BASE

    def at(self, key: str) -> OpenState:
        """Return the state of an entry."""
        return self.now if key == self.now.key else self.now.at(key)

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the run's rows."""
        return tokenizer_of(self.state, resolve_model(self.state.base.model))

    @cached_property
    def rows(self) -> RowFacts | None:
        """Return facts that the kept training rows have in common."""
        return training_rows(self.state, self.tokenizer)

    def prompts(self, count: int) -> list[str]:
        """Return the first kept prompts of each stage."""
        kept = {key: rows for key, rows in self.state.kept().items() if key != START}
        rows = [row for stage in kept.values() for row in stage.scored[1][:count]]
        texts = [self.tokenizer.decode(row.prompt, skip_special_tokens=True) for row in rows]
        return list(dict.fromkeys(text for text in texts if text))

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.state, self.state.kept(), hold="carried")

    def release(self) -> None:
        """Release the model; it is loaded again when it is needed."""
        vars(self).pop("_scorer", None)

    def answer(
        self, key: str, turns: Sequence[Message], decoding: Decoding, *, as_chat: bool
    ) -> Iterator[str]:
        """Yield the growing answer of an entry; the last item is the whole answer.

        `turns` end with the question. With `as_chat` they are rendered by the model's template.
        Otherwise only the question is continued, as by `chainlora generate`. Closing the iterator
        stops the model.
        """
        with self._one_at_a_time:
            model = self._scorer.model_at(self.at(key).state)
            speaker, text = Speaker(model, self.tokenizer, decoding), ""
            question = turns[-1]["content"]
            for piece in speaker.answer(turns) if as_chat else speaker.complete(question):
                text += piece
                yield text
            yield speaker.text

    def replies(self, keys: Sequence[str], stage: str | None = None) -> list[Answer]:
        """Answer questions of kept training rows in entries, those of `stage` or of all stages.

        There are at most `MOST_ASKED` rows. Raises RunError for rows without questions.
        """
        kept = {name: rows for name, rows in self.state.kept().items() if name in self.state.stages}
        wanted = [stage] if stage in kept else list(kept)
        count = MOST_ASKED // max(1, min(len(wanted), MOST_ASKED))
        sources = [
            Source(name, _in_order(kept[name].train[:count]), kept[name].asked["stop"])
            for name in wanted[-MOST_ASKED:]
        ]
        prompts = prompts_of(sources, self.tokenizer)
        if not prompts:
            raise RunError(
                "There are no questions to ask: the kept rows are texts, or there are none"
            )
        said = []
        with self._one_at_a_time:
            for key in keys:
                model = self._scorer.model_at(self.at(key).state)
                said.append(answer(self.words(key), model, self.tokenizer, prompts, None))
        return [
            Answer(prompt.text, prompt.expected, replies, prompt.stage)
            for prompt, *replies in zip(prompts, *said, strict=True)
        ]

    def save(self, key: str) -> None:
        """Make an entry the run, as `chainlora undo --to` does."""
        if key != open_run(self.run).key:
            undo(self.run, key)

    def export(self, key: str, output: str | Path, to: str) -> dict[str, Any]:
        """Export an entry, as `chainlora export` does. The run does not change."""
        return exporter_to(to)(self.at(key), output)


def _in_order(rows: Sequence[Example]) -> list[Example]:
    """Return rows in the order of their file; kept rows are ordered by their hashes."""
    return sorted(rows, key=lambda row: row.row)


def _or_base(state: OpenState) -> OpenState:
    """Return a state, or the base for one without links, such as that of general rows."""
    return state if state.facts else replace(state, entry=None)
