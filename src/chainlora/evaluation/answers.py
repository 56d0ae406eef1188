"""Prompts and their answers, as people read them: of rows, or of a text.

Rows with candidates are answered as they are scored: by the candidate of the highest probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from chainlora.data.examples import Example
from chainlora.data.templates import without_markup
from chainlora.evaluation.evaluate import evaluate
from chainlora.evaluation.generation import generate_greedy
from chainlora.evaluation.metrics import cross_entropy, exact_match


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, their text, and the row that they are of, if any: of which stage, what is
    right there, and which text ends an answer."""

    ids: tuple[int, ...]
    text: str
    stop: str | None
    row: Example | None = None
    stage: str = ""
    expected: str | None = None


class Source(NamedTuple):
    """Rows of a stage to ask for, and which text ends an answer."""

    stage: str
    rows: Sequence[Example]
    stop: str | None


class Said(NamedTuple):
    """An answer: when it was given, a note such as its probability, and whether it is right."""

    when: str
    text: str = ""
    note: str = ""
    is_right: bool | None = None


def answer(
    when: str, model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Said]:
    """Answer prompts greedily, those of one end of an answer together."""
    found = [Said(when)] * len(prompts)
    for stop in dict.fromkeys(prompt.stop for prompt in prompts):
        asked = [place for place, prompt in enumerate(prompts) if prompt.stop == stop]
        keys = {"stop": stop, "max_new_tokens": max_new_tokens}
        said = _said(when, model, tokenizer, [prompts[place] for place in asked], **keys)
        for place, each in zip(asked, said, strict=True):
            found[place] = each
    return found


def _said(
    when: str, model: Any, tokenizer: Any, prompts: Sequence[Prompt], **keys: Any
) -> Iterator[Said]:
    """Yield the answer to each prompt: where candidates are ranked, the one of the highest
    probability."""
    ranked = [prompt.row for prompt in prompts if prompt.row and prompt.row.label is not None]
    choices = iter(evaluate(model, ranked, metrics="accuracy").predictions if ranked else [])
    free = [p.ids for p in prompts if p.row is None or p.row.label is None]
    texts = iter(generate_greedy(model, tokenizer, free, **keys) if free else [])
    for prompt in prompts:
        if prompt.row is None or prompt.row.label is None:
            text = next(texts)
            known = prompt.row.references if prompt.row else ()
            yield Said(when, text, "", exact_match(text, known) == 1 if known else None)
        else:
            choice = next(choices)
            chosen = choice["prediction"]
            share = math.exp(-cross_entropy(choice["scores"], chosen))
            text = _candidate(prompt.row, chosen, tokenizer)
            yield Said(when, text, f"{share:.0%}", chosen == prompt.row.label)


def prompts_of(sources: Sequence[Source], tokenizer: Any) -> list[Prompt]:
    """Return the prompts of rows; plain text has none."""
    found = []
    for stage, rows, stop in sources:
        for row in (each for each in rows if len(each.prompt) > 1):
            is_free = row.references and row.label is None
            right = row.references if is_free else [_candidate(row, row.label or 0, tokenizer)]
            text = _shown(row.prompt, tokenizer)
            found.append(Prompt(row.prompt, text, stop, row, stage, " / ".join(right)))
    return found


def _shown(prompt: Sequence[int], tokenizer: Any) -> str:
    """Return a prompt as people read it: of a chat what is said, without its template's markup."""
    said = without_markup(tokenizer, str(tokenizer.decode(prompt)))
    return str(tokenizer.decode(prompt, skip_special_tokens=True)) if said is None else said


def _candidate(row: Example, index: int, tokenizer: Any) -> str:
    """Return a candidate, or the completion, in words."""
    tokens = row.sequences[index][len(row.prompt) :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
