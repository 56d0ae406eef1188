"""A plain model in memory that becomes the base with any update, and is scored.

An update is a tensor for each module, or links whose updates are added. Nothing here trains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainlora import Link, load_model, load_task
from chainlora.data.encoding import Options, RowEncoder
from chainlora.data.examples import Example
from chainlora.data.sources import Row

HERE = Path(__file__).parent
Update = Mapping[str, Tensor] | Sequence[Link]
KINDS = {"gsm8k": 60, "dialogsum": 60, "boolq": 60, "alpaca form": 60}
_AT_ONCE = 4_096  # tokens of a batch, with padding


class Scored:
    """A model with an update put into its weights, in its own dtype."""

    def __init__(self, name: str, dtype: str, data: Path) -> None:
        self.model, self.tokenizer = load_model(name, dtype=dtype)
        self.model.requires_grad_(False)
        self.data = data
        task = load_task(HERE / "field.yaml")
        self._encode = RowEncoder(task, self.tokenizer, Options(objective="completion"))
        self._base: dict[str, Tensor] = {}  # weights of modules that were changed

    def encode(self, rows: Sequence[Mapping[str, str]]) -> list[Example]:
        """Return rows of prompt and answer as examples."""
        found = [Row(dict(row), place, "field") for place, row in enumerate(rows)]
        return self._encode(found)

    @torch.no_grad()
    def put(self, update: Update) -> None:
        """Make the model the base with an update."""
        links = [] if isinstance(update, Mapping) else [*update]
        dense = update if isinstance(update, Mapping) else {}
        names = dict.fromkeys([*dense, *(name for link in links for name in link.factors)])
        for name in {*self._base} - {*names}:
            self._weight(name).copy_(self._base.pop(name))
        for name in names:
            weight = self._weight(name)
            base = self._base.setdefault(name, weight.clone())
            parts = [link.delta_weight(name) for link in links]
            parts += [dense[name]] if name in dense else []
            total = sum(parts, base.float())
            weight.copy_(total)

    def _weight(self, name: str) -> Tensor:
        found: Tensor = self.model.get_submodule(name).weight
        return found

    @torch.no_grad()
    def hidden(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield places of rows, their last hidden states and which of these are inside."""
        for places in _batches(rows):
            longest = max(len(rows[place]) for place in places)
            padded = [[*rows[p], *[rows[p][-1]] * (longest - len(rows[p]))] for p in places]
            inside = torch.arange(longest) < torch.tensor([[len(rows[p])] for p in places])
            out = self.model.model(
                input_ids=torch.tensor(padded), attention_mask=inside.long(), use_cache=False
            )
            yield places, out.last_hidden_state, inside

    @torch.no_grad()
    def means(self, rows: Sequence[Sequence[int]], layer: int) -> Tensor:
        """Return the mean over the tokens of each row of the hidden states behind a layer."""
        found = torch.zeros(len(rows), self.model.config.hidden_size)
        for places in _batches(rows):
            for place in places:  # alone: a row's mean does not depend on the others
                ids = torch.tensor([[*rows[place]]])
                out = self.model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
                found[place] = out.hidden_states[layer][0].float().mean(0)
        return found

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> list[bool]:
        """Say of each row whether greedy generation writes its label, and then a line break.

        It does where every token of both is the most probable one after those before it, which
        one forward shows.
        """
        right = [False] * len(examples)
        for places, hidden, _ in self.hidden([each.sequences[0] for each in examples]):
            for row, place in enumerate(places):
                ((start, end),) = examples[place].scored[0]
                logits = self.model.lm_head(hidden[row, start - 1 : end - 1])
                wanted = [*examples[place].sequences[0][start:end]]
                right[place] = logits.argmax(-1).tolist() == wanted
        return right

    @torch.no_grad()
    def losses(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the summed negative log-likelihood of each text, after its first token."""
        found = [0.0] * len(texts)
        for places, hidden, inside in self.hidden(texts):
            for row, place in enumerate(places):
                wanted = torch.tensor(texts[place][1:])
                some = hidden[row][inside[row]][:-1]
                logs = torch.log_softmax(self.model.lm_head(some).float(), -1)
                found[place] = -float(logs.gather(-1, wanted[:, None]).sum())
        return found

    # --- general ability: texts and facts are those of the verdict of benchmarks/combining ---

    def texts(self, kind: str, first: int = 0, count: int | None = None) -> list[list[int]]:
        """Return texts of a kind, by default as many as `KINDS` says, of at most 128 tokens."""
        if kind == "gsm8k":
            found = [f"{r['question']}\n{r['answer']}" for r in self._lines("gsm8k/test.jsonl")]
        elif kind == "dialogsum":
            found = [row["dialogue"] for row in self._lines("dialogsum/test.jsonl")]
        elif kind == "boolq":
            found = [row["passage"] for row in self._lines("boolq/validation.jsonl")]
        else:
            form = "### Instruction:\n{}\n\n### Response:\n{}"
            rows = self._lines("alpaca_demo/train.jsonl")[700:]
            asked = [r["instruction"] + ("\n" + r["input"] if r.get("input") else "") for r in rows]
            found = [form.format(a, r["output"]) for a, r in zip(asked, rows, strict=True)]
        some = found[first:][: KINDS[kind] if count is None else count]
        return [self._tokens(text)[:128] for text in some]

    def _lines(self, path: str) -> list[dict[str, Any]]:
        text = (self.data / path).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.strip().split("\n")]

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def facts(self) -> list[Example]:
        """Return statements whose last word is to be written."""
        pairs = json.loads((HERE.parent / "combining" / "outside.json").read_text())
        rows = []
        for prompt, answer in pairs:
            start, wanted = self._tokens(prompt), self._tokens(f" {answer}")
            span = (len(start), len(start) + len(wanted))
            rows.append(Example(0, (tuple(start + wanted),), ((span,),)))
        return rows


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield places of rows of about one length."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: (len(rows[place]), place)):
        if batch and (len(batch) + 1) * len(rows[place]) > _AT_ONCE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


# --- one model or several, each row by one of them ---


class Models:
    """Models by name, and which of them answers a row: `route` takes the task ("" of other texts)
    and the tokens of prompts, and returns names."""

    def __init__(
        self,
        updates: Mapping[str, Update],
        route: Callable[[str, Sequence[Sequence[int]]], list[str]] | None = None,
    ) -> None:
        self.updates = updates
        self.route = route or (lambda task, prompts: [*updates] * len(prompts))


def right_by_task(
    scored: Scored, models: Models, rows: Mapping[str, Sequence[Example]]
) -> dict[str, float]:
    """Return the share of rows that are answered right, by task."""
    found = _by_model(scored, models, rows, scored.answers, are_tasks=True)
    return {task: sum(each) / len(each) for task, each in found.items()}


def general(scored: Scored, models: Models) -> dict[str, Any]:
    """Return the perplexity of each kind of text from outside, and the share of facts written."""
    found = perplexities(scored, models, {kind: scored.texts(kind) for kind in KINDS})
    right = _by_model(scored, models, {"": scored.facts()}, scored.answers)[""]
    return {"perplexity": found, "facts": sum(right) / len(right)}


def perplexities(
    scored: Scored, models: Models, texts: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, float]:
    """Return the perplexity of each kind of text."""
    rows = {kind: [as_example(text) for text in some] for kind, some in texts.items()}
    told = _by_model(
        scored, models, rows, lambda some: scored.losses([each.sequences[0] for each in some])
    )
    counts = {kind: sum(len(text) - 1 for text in some) for kind, some in texts.items()}
    return {kind: math.exp(sum(told[kind]) / counts[kind]) for kind in texts}


def as_example(tokens: Sequence[int]) -> Example:
    """Return a text as an example all of which is read."""
    return Example(0, (tuple(tokens),), (((len(tokens), len(tokens)),),))


def _by_model(
    scored: Scored,
    models: Models,
    rows: Mapping[str, Sequence[Example]],
    compute: Callable[[Sequence[Example]], list[Any]],
    *,
    are_tasks: bool = False,
) -> dict[str, list[Any]]:
    """Compute each row by its model; every model is put in once."""
    routed = {
        key: models.route(key if are_tasks else "", [each.prompt for each in some])
        for key, some in rows.items()
    }
    found = {key: [None] * len(some) for key, some in rows.items()}
    for name in sorted({name for names in routed.values() for name in names}):
        scored.put(models.updates[name])
        for key, names in routed.items():
            places = [place for place, each in enumerate(names) if each == name]
            values = compute([rows[key][place] for place in places])
            for place, value in zip(places, values, strict=True):
                found[key][place] = value
    return found
