"""Evaluate a model on examples: metrics, and one prediction for each row.

Candidates are compared by the mean log-probability of their tokens (as in MeZO, arXiv 2305.17333);
the best one is the prediction, the one with the *lowest index* among equals. Language-model rows
give loss and perplexity per token. Free-text answers are generated greedily. Weights never change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import mul
from statistics import fmean
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
from chainlora.models.text_config import causal_model


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    `predictions` has one dict per row, in the order of the examples: `row`, `label` (right
    candidate or None), `prediction` (chosen candidate, generated text, or None for language-model
    rows) and `scores` (mean log-probability per token of each sequence, natural logarithm). Rows
    without candidates also have `tokens`, the number of scored tokens. For text metrics, rows have
    their `references`, and a chosen candidate its text as `answer`.
    """

    metrics: dict[str, float]
    num_rows: int
    predictions: list[dict[str, Any]] = field(repr=False)


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
    """Score `examples`, and return the metrics and a prediction for every row.

    Args:
        model: the model, in any mode; the mode is restored, and weights never change.
        examples: candidate rows (with a label) or language-model rows (without), not both.
        metrics: of `accuracy`, `f1` (macro), `em`, `token_f1`, `loss`, `perplexity`. Candidate rows
            always get `loss`, the mean over rows of the cross-entropy over candidates.
            Language-model rows get `loss` per token (natural logarithm) and `perplexity`, unless
            all metrics are `em` and `token_f1`, which generate answers.
        tokenizer: needed for `em` and `token_f1`, unless candidates have names.
        engine: runs the model; by default a new one is made for the call.
        max_tokens: the most tokens of one forward pass, shared ones counted once; a longer row is
            computed alone.
        max_new_tokens: the most tokens of a generated answer (default 50, as in MeZO).
        stop: text that ends a generated answer, beside the end-of-sequence token; None: only that
            token.
        progress: called as ``progress(rows_done, rows)`` after each pack.

    Raises:
        ConfigError: an unknown metric, or one that does not fit these rows.
        DataError: no examples.
        ModelError: the model gives scores that are not numbers.
    """
    names = check_metrics(metrics)
    examples = list(examples)
    is_labelled = bool(examples) and examples[0].label is not None
    _check_rows(names, examples, is_labelled=is_labelled)
    has_text = any(name in TEXT_METRICS for name in names)
    is_generated = has_text and not is_labelled
    is_scored = not is_generated or any(name in LOSS_METRICS for name in names)
    report = progress or (lambda done, rows: None)
    scores: list[list[float]] = [[]] * len(examples)
    answers: Sequence[str | None] = [None] * len(examples)
    with nullcontext(engine) if engine else Engine(model, training=False) as runner:
        if is_scored:
            # a row is done only after its answer, if answers follow
            first = (lambda done, rows: report(0, rows)) if is_generated else report
            scores = runner.scores(examples, max_tokens=max_tokens, progress=first)
        if is_generated:
            keys: Any = {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "stop": stop}
            keys |= {"tokenizer": _required(tokenizer), "progress": report}
            answers = _answers(runner, examples, **keys)
    columns = zip(examples, scores, answers, strict=True)
    predictions = [_prediction(*row, has_text, tokenizer) for row in columns]
    results = _metrics(names, predictions, is_scored=is_scored, is_labelled=is_labelled)
    return Evaluation(results, len(examples), predictions)


def _metrics(
    names: Sequence[str],
    predictions: Sequence[dict[str, Any]],
    *,
    is_scored: bool,
    is_labelled: bool,
) -> dict[str, float]:
    """Return the metrics of all rows; `loss` is always there if rows were scored."""
    labels, chosen = ([row[key] for row in predictions] for key in ("label", "prediction"))
    results = {name: INDEX_METRICS[name](labels, chosen) for name in names if name in INDEX_METRICS}
    results |= {
        name: fmean(_text_scores(name, predictions)) for name in names if name in TEXT_METRICS
    }
    if is_scored:
        weights = [row.get("tokens", 1) for row in predictions]
        results["loss"] = _mean([_loss(row) for row in predictions], weights)
    if is_scored and not is_labelled:
        results["perplexity"] = perplexity(results["loss"])
    return results


def _prediction(
    example: Example,
    scores: list[float],
    answer: str | None,
    has_text: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Return the prediction of a row (`Evaluation`); `has_text` adds what text metrics need."""
    prediction: dict[str, Any] = {"row": example.row, "label": example.label}
    prediction |= {"prediction": answer, "scores": scores}
    if example.label is not None:
        prediction["prediction"] = scores.index(max(scores))
    elif scores:
        prediction["tokens"] = example.num_learned
    if has_text:
        prediction["references"] = list(example.references)
    if has_text and example.label is not None:
        prediction["answer"] = _candidate_text(example, prediction["prediction"], tokenizer)
    return prediction


def _answers(engine: Engine, examples: Sequence[Example], **options: Any) -> list[str]:
    """Generate an answer to each prompt; `options` are those of `generate_greedy`."""

    def generate(prompts: Sequence[Any]) -> list[str]:
        with engine.plain() as model:
            keys: Any = {"prompts": prompts, "most": engine.most} | options
            return generate_greedy(causal_model(model), **keys)

    texts: list[str] = engine.spread([example.prompt for example in examples], generate)
    return texts


def _check_rows(names: Sequence[str], examples: Sequence[Example], *, is_labelled: bool) -> None:
    """Raise DataError for no rows; ConfigError or DataError for a metric that does not fit them."""
    if not examples:
        remedy = "check the split and --limit"
        raise DataError("an evaluation needs at least one example", "none", remedy)
    unfit, needed, given = [*INDEX_METRICS], "rows with a right candidate", "rows without"
    if is_labelled:
        unfit, needed, given = ["perplexity"], "rows without candidates", "rows with them"
    unanswered = next((example for example in examples if not example.references), None)
    for name in names:
        if name in unfit:
            raise ConfigError(f"metric {name!r} needs {needed}", given, "ask for another metric")
        if name in TEXT_METRICS and unanswered is not None:
            got = f"none at row {unanswered.row}"
            raise DataError(f"metric {name!r} needs gold answers", got, "give references")


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        rule = "metrics `em` and `token_f1` compare words"
        raise ConfigError(rule, "no tokenizer", "pass `tokenizer`")
    return tokenizer


def _candidate_text(example: Example, index: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the name of a candidate, or if it has none, its tokens as text."""
    if example.names:
        return example.names[index]
    tokens = [
        t for start, end in example.scored[index] for t in example.sequences[index][start:end]
    ]
    return str(_required(tokenizer).decode(tokens, skip_special_tokens=True)).strip()


def values(evaluation: Evaluation, metric: str) -> list[float]:
    """Return the values of rows whose mean by `weights_of` is a metric, [] if it is no mean."""
    rows = evaluation.predictions
    if metric == "accuracy":  # 0.5 for a pair whose answers have equal rewards
        pairs = [(row["prediction"], row["label"]) for row in rows]
        return [0.5 if chosen is None else float(chosen == label) for chosen, label in pairs]
    if metric == "loss":
        return [_loss(row) for row in rows]
    return _text_scores(metric, rows) if metric in TEXT_METRICS else []


def _text_scores(metric: str, rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return a text metric of each row."""
    judge = TEXT_METRICS[metric]
    return [judge(row.get("answer", row["prediction"]), row["references"]) for row in rows]


def weights_of(evaluation: Evaluation, metric: str) -> list[int]:
    """Return the weight of each row in the mean of a metric: for a loss per token, its tokens."""
    return [row.get("tokens", 1) if metric == "loss" else 1 for row in evaluation.predictions]


def standard_error(numbers: Sequence[float], weights: Sequence[int]) -> float:
    """Return the standard error of a weighted mean, by linearisation; inf for a single number."""
    if len(numbers) < 2:
        return math.inf
    mean, pairs = _mean(numbers, weights), zip(numbers, weights, strict=True)
    squares = math.fsum((weight * (number - mean)) ** 2 for number, weight in pairs)
    return math.sqrt(squares * len(numbers) / (len(numbers) - 1)) / sum(weights)


def _mean(numbers: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(map(mul, numbers, weights)) / sum(weights)


def _loss(row: dict[str, Any]) -> float:
    """Return the loss of a prediction: given, per token, or of its right candidate."""
    scores, label = row["scores"], row["label"]
    if "loss" in row:
        return float(row["loss"])
    return float(-scores[0]) if label is None else cross_entropy(scores, label)
