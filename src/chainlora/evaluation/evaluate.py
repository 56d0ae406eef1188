"""Evaluation: examples in, metrics and one prediction a row out; the weights are never touched.

Candidates are compared by the mean log-probability of their tokens (the MeZO protocol, arXiv
2305.17333); the best wins, the *lowest index* among equals. Language-model rows give loss and
perplexity per token; free-text answers are generated greedily. The engine runs the
model; nothing here knows about packs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from chainlora.data.examples import Example
from chainlora.engine.engine import Engine, ScoringProgress
from chainlora.errors import ConfigError, DataError
from chainlora.evaluation.generation import generate_greedy
from chainlora.evaluation.metrics import (
    INDEX_METRICS,
    LOSS_METRICS,
    TEXT_METRICS,
    check_metrics,
    cross_entropy,
    perplexity,
)
from chainlora.files import make_folder, write_text
from chainlora.models.text_config import causal_model


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    `predictions` has one dict a row, in the order of the examples: `row`, `label` (right candidate
    or None), `prediction` (chosen candidate, generated text, or None for language-model rows) and
    `scores` (mean log-probability per token of each sequence, natural logarithm); generated rows
    also have `references`.
    """

    metrics: dict[str, float]
    num_rows: int
    predictions: list[dict[str, Any]]


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    metrics: Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    engine: Engine | None = None,
    max_tokens: int = 4096,
    max_new_tokens: int = 50,
    stop: str | None = "\n",
    progress: ScoringProgress | None = None,
) -> Evaluation:
    """Score `examples` and return the metrics asked for, with a prediction for every row.

    Args:
        model: the model, in any mode; modes are as before on return, weights are never changed.
        examples: candidate rows (with a label) or language-model rows (without), not both.
        metrics: of `accuracy`, `f1` (macro), `em`, `token_f1`, `loss`, `perplexity`. Candidate rows
            always get `loss`, the mean over rows of the cross-entropy over candidates;
            language-model rows get `loss` per token (natural logarithm) and `perplexity`, unless
            only `em` and `token_f1`, which generate, are asked for.
        tokenizer: for `em` and `token_f1`, unless candidates have names.
        engine: what runs the model; without one, one is made for the call.
        max_tokens: tokens computed in one forward, shared ones counted once; a larger row goes
            alone.
        max_new_tokens: bound of a generated answer (default 50, as in MeZO).
        stop: text that ends a generated answer, beside the end-of-sequence token; None is that
            token alone.
        progress: called as ``progress(rows_done, rows)`` after each pack.

    Raises:
        ConfigError: an unknown metric, or one that these rows cannot give.
        DataError: no examples, or rows with and without a label mixed.
        ModelError: the model gives scores that are not numbers.
    """
    names = check_metrics(metrics)
    examples = list(examples)
    is_labelled = _are_labelled(examples)
    _check_names(names, is_labelled=is_labelled)
    with nullcontext(engine) if engine else Engine(model, training=False) as runner:
        asked = _Asked(
            runner, examples, names, tokenizer, max_tokens, max_new_tokens, stop, progress
        )
        if is_labelled:
            return _by_candidates(asked)
        if not asked.of_text:
            return _by_likelihood(asked)
        if not any(name in LOSS_METRICS for name in names):
            return _by_answers(asked)
        scored = _by_likelihood(replace(asked, progress=_none_done(progress)))
        return _with_scores(_by_answers(asked), scored)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `evaluate`, by their names there."""

    engine: Engine
    examples: list[Example]
    names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    max_tokens: int
    max_new_tokens: int
    stop: str | None
    progress: ScoringProgress | None

    @property
    def of_text(self) -> list[str]:
        """The metrics that compare answers in words."""
        return [name for name in self.names if name in TEXT_METRICS]

    def scores(self) -> list[list[float]]:
        return self.engine.scores(self.examples, max_tokens=self.max_tokens, progress=self.progress)


def write_predictions(path: str | FilePath, evaluation: Evaluation) -> None:
    """Write a JSON object a row: `row`, `label`, `prediction`, `scores`, `references`."""
    target = FilePath(path)
    make_folder(target.parent)
    lines = [
        json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in evaluation.predictions
    ]
    write_text(target, "".join(lines))


# --- the three kinds of rows ---


def _by_candidates(asked: _Asked) -> Evaluation:
    """Choose the likeliest candidate of each row."""
    examples, scores = asked.examples, asked.scores()
    labels = [int(example.label) for example in examples if example.label is not None]
    chosen = [_best(row) for row in scores]
    found = {
        name: INDEX_METRICS[name](labels, chosen) for name in asked.names if name in INDEX_METRICS
    }
    if asked.of_text:
        pairs = zip(examples, chosen, strict=True)
        texts = [_candidate_text(example, i, asked.tokenizer) for example, i in pairs]
        found |= _text_metrics(asked, texts)
    found["loss"] = math.fsum(map(cross_entropy, scores, labels)) / len(examples)
    predictions = [
        {"row": example.row, "label": example.label, "prediction": choice, "scores": row}
        for example, choice, row in zip(examples, chosen, scores, strict=True)
    ]
    return Evaluation(found, len(examples), predictions)


def _by_likelihood(asked: _Asked) -> Evaluation:
    """Score the text of each row: the loss is per token, over all rows."""
    examples, scores = asked.examples, asked.scores()
    counts = [sum(end - start for start, end in example.scored[0]) for example in examples]
    total = math.fsum(-row[0] * count for row, count in zip(scores, counts, strict=True))
    loss = total / sum(counts)
    predictions: list[dict[str, Any]] = [
        {"row": example.row, "label": None, "prediction": None, "scores": row}
        for example, row in zip(examples, scores, strict=True)
    ]
    return Evaluation({"loss": loss, "perplexity": perplexity(loss)}, len(examples), predictions)


def _by_answers(asked: _Asked) -> Evaluation:
    """Let the model answer each prompt, and compare with the references."""
    examples, engine, done = asked.examples, asked.engine, 0
    tokenizer = _required(asked.tokenizer)

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if asked.progress is not None:
            asked.progress(done, len(examples))

    def generate(prompts: Sequence[Any]) -> list[str]:
        with engine.plain() as model:
            return generate_greedy(
                causal_model(model),
                tokenizer,
                prompts,
                max_new_tokens=asked.max_new_tokens,
                stop=asked.stop,
                max_tokens=asked.max_tokens,
                progress=advance,
                most=engine.most,
            )

    texts: list[str] = engine.spread([example.prompt for example in examples], generate)
    predictions: list[dict[str, Any]] = [
        {
            "row": example.row,
            "label": None,
            "prediction": text,
            "scores": [],
            "references": list(example.references),
        }
        for example, text in zip(examples, texts, strict=True)
    ]
    return Evaluation(_text_metrics(asked, texts), len(examples), predictions)


# --- parts of them ---


def _with_scores(generated: Evaluation, scored: Evaluation) -> Evaluation:
    """Return one evaluation of two of the same rows: answers, and what likelihood says."""
    pairs = zip(generated.predictions, scored.predictions, strict=True)
    predictions = [answer | {"scores": score["scores"]} for answer, score in pairs]
    return Evaluation(generated.metrics | scored.metrics, generated.num_rows, predictions)


def _none_done(progress: ScoringProgress | None) -> ScoringProgress:
    """Return what reports each batch, and no row as done: its answer is still to come."""

    def report(done: int, rows: int) -> None:
        if progress is not None:
            progress(0, rows)

    return report


def _are_labelled(examples: Sequence[Example]) -> bool:
    if not examples:
        raise DataError(
            "an evaluation needs at least one example (got none); check the split and --limit"
        )
    labelled = [example.label is not None for example in examples]
    if any(labelled) and not all(labelled):
        raise DataError(
            f"rows with and without a right candidate cannot be scored together (got none at row "
            f"{examples[labelled.index(False)].row}); evaluate them apart"
        )
    if not labelled[0] and any(len(example.sequences) != 1 for example in examples):
        raise DataError("rows of several candidates need a right one (got none); give the label")
    return labelled[0]


def _check_names(names: Sequence[str], *, is_labelled: bool) -> None:
    """Raise ConfigError for a metric that rows with (or without) a label cannot give."""
    unfit = ["perplexity"] if is_labelled else list(INDEX_METRICS)
    needed, given = "rows with a right candidate", "rows without"
    if is_labelled:
        needed, given = "rows without candidates", "rows with them"
    for name in names:
        if name in unfit:
            raise ConfigError(
                f"metric {name!r} needs {needed} (got {given}); ask for another metric"
            )


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ConfigError(
            "metrics `em` and `token_f1` compare words (got no tokenizer); pass `tokenizer`"
        )
    return tokenizer


def _text_metrics(asked: _Asked, texts: Sequence[str]) -> dict[str, float]:
    for example in asked.examples:
        if not example.references:
            raise DataError(
                f"metric {asked.of_text[0]!r} needs gold answers (got none at row {example.row}); "
                "give references"
            )
    pairs = list(zip(texts, asked.examples, strict=True))
    return {
        name: math.fsum(TEXT_METRICS[name](text, each.references) for text, each in pairs)
        / len(pairs)
        for name in asked.of_text
    }


def _candidate_text(example: Example, index: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return what a candidate stands for, else its own words."""
    if example.names:
        return example.names[index]
    tokens = [
        t for start, end in example.scored[index] for t in example.sequences[index][start:end]
    ]
    return str(_required(tokenizer).decode(tokens, skip_special_tokens=True)).strip()


def _best(scores: Sequence[float]) -> int:
    """Return the index of the largest score, the lowest among equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
