"""Answer prompts of rows or texts, and return the answers as readable text.

A row with candidates is answered by the candidate with the highest probability, as it is scored.
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
from chainlora.evaluation.training_rows import limit_for
from chainlora.models.text_config import context_length


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer."""

    ids: tuple[int, ...]  # tokens
    text: str
    stop: str | None  # the text that ends an answer
    row: Example | None = None  # the row that it comes from
    stage: str = ""  # of the row
    expected: str | None = None  # the right answer, if known


class Source(NamedTuple):
    """Rows of a stage, to answer."""

    stage: str
    rows: Sequence[Example]
    stop: str | None  # the text that ends an answer


class Said(NamedTuple):
    """An answer of a model."""

    when: str  # the state of the model
    text: str = ""
    note: str = ""  # such as its probability
    is_right: bool | None = None  # None: not known


def answer(
    when: str, model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int | None
) -> list[Said]:
    """Answer prompts greedily; prompts with the same `stop` are generated together.

    Without `max_new_tokens`, there is room for the right answers of the prompts.
    """
    answers = [Said(when)] * len(prompts)
    if max_new_tokens is None:
        longest = max((_longest(prompt.row) for prompt in prompts if prompt.row), default=0)
        max_new_tokens = min(limit_for(longest), context_length(model) // 2)
    for stop in dict.fromkeys(prompt.stop for prompt in prompts):
        places = [place for place, prompt in enumerate(prompts) if prompt.stop == stop]
        keys = {"stop": stop, "max_new_tokens": max_new_tokens}
        group = _answers(when, model, tokenizer, [prompts[place] for place in places], **keys)
        for place, said in zip(places, group, strict=True):
            answers[place] = said
    return answers


def _answers(
    when: str, model: Any, tokenizer: Any, prompts: Sequence[Prompt], **keys: Any
) -> Iterator[Said]:
    """Yield the answer to each prompt; a row with candidates gets the most probable one."""
    ranked = [prompt.row for prompt in prompts if prompt.row and prompt.row.label is not None]
    choices = iter(evaluate(model, ranked, metrics="accuracy").predictions if ranked else [])
    free = [p.ids for p in prompts if p.row is None or p.row.label is None]
    texts = iter(generate_greedy(model, tokenizer, free, **keys) if free else [])
    for prompt in prompts:
        if prompt.row is None or prompt.row.label is None:
            text = next(texts)
            references = prompt.row.references if prompt.row else ()
            is_cut = prompt.row is not None and _longest(prompt.row) > keys["max_new_tokens"]
            is_right = exact_match(text, references) == 1 if references and not is_cut else None
            yield Said(when, text, "", is_right)
        else:
            choice = next(choices)
            chosen = choice["prediction"]
            share = math.exp(-cross_entropy(choice["scores"], chosen))
            text = _candidate(prompt.row, chosen, tokenizer)
            yield Said(when, text, f"{share:.0%}", chosen == prompt.row.label)


def prompts_of(sources: Sequence[Source], tokenizer: Any) -> list[Prompt]:
    """Return the prompts of rows; rows of plain text have no prompt and are skipped."""
    prompts = []
    for stage, rows, stop in sources:
        for row in (row for row in rows if len(row.prompt) > 1):
            is_free = row.references and row.label is None
            right = row.references if is_free else [_candidate(row, row.label or 0, tokenizer)]
            text = without_markup(tokenizer, str(tokenizer.decode(row.prompt)))
            if text is None:
                text = str(tokenizer.decode(row.prompt, skip_special_tokens=True))
            prompts.append(Prompt(row.prompt, text, stop, row, stage, " / ".join(right)))
    return prompts


def _longest(row: Example) -> int:
    """Return the number of tokens of the longest answer of a row."""
    return max(map(len, row.sequences)) - len(row.prompt)


def _candidate(row: Example, index: int, tokenizer: Any) -> str:
    """Return a candidate, or the completion, as text."""
    tokens = row.sequences[index][len(row.prompt) :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
