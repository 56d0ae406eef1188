"""Evaluation: examples in, metrics and one prediction a row out; the weights are never touched.

Candidates are compared by the mean log-probability of their tokens (the MeZO protocol, arXiv
2305.17333); the best wins, the *lowest index* among equals. Language-model rows give loss and
perplexity per token; free-text answers are generated greedily. The engine runs the
model; nothing here knows about packs.
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
    """What an evaluation found.

    `predictions` has one dict a row, in the order of the examples: `row`, `label` (right candidate
    or None), `prediction` (chosen candidate, generated text, or None for language-model rows) and
    `scores` (mean log-probability per token of each sequence, natural logarithm); rows without
    candidates also have `tokens`, how many are scored. Answers that are compared in words have
    their `references`, and a chosen candidate its words as `answer`.
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
        DataError: no examples.
        ModelError: the model gives scores that are not numbers.
    """
    names = check_metrics(metrics)
    examples = list(examples)
    is_labelled = bool(examples) and examples[0].label is not None
    in_words = [name for name in names if name in TEXT_METRICS]
    _check_rows(names, examples, is_labelled=is_labelled)
    is_written = bool(in_words) and not is_labelled
    is_scored = not is_written or any(name in LOSS_METRICS for name in names)
    tell = progress or (lambda done, rows: None)

    def scored(done: int, rows: int) -> None:
        tell(0 if is_written else done, rows)  # answers are still to come

    scores: list[list[float]] = [[]] * len(examples)
    answers: Sequence[str | None] = [None] * len(examples)
    with nullcontext(engine) if engine else Engine(model, training=False) as runner:
        if is_scored:
            scores = runner.scores(examples, max_tokens=max_tokens, progress=scored)
        if is_written:
            answers = _answers(
                runner,
                examples,
                tell,
                tokenizer=_required(tokenizer),
                max_tokens=max_tokens,
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
    parts = zip(examples, scores, answers, strict=True)
    predictions = [_prediction(*each, bool(in_words), tokenizer) for each in parts]
    pair = [[row[key] for row in predictions] for key in ("label", "prediction")]
    found = {name: INDEX_METRICS[name](*pair) for name in names if name in INDEX_METRICS}
    found |= {name: fmean(_in_words(name, predictions)) for name in in_words}
    if is_scored:
        weights = [row.get("tokens", 1) for row in predictions]
        found["loss"] = _mean([_loss(row) for row in predictions], weights)
    if is_scored and not is_labelled:
        found["perplexity"] = perplexity(found["loss"])
    return Evaluation(found, len(examples), predictions)


def _prediction(
    example: Example,
    scores: list[float],
    answer: str | None,
    in_words: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Return what an evaluation tells of a row."""
    found: dict[str, Any] = {"row": example.row, "label": example.label}
    found |= {"prediction": answer, "scores": scores}
    if example.label is not None:
        found["prediction"] = scores.index(max(scores))
    elif scores:
        found["tokens"] = example.num_learned
    if in_words:
        found["references"] = list(example.references)
    if in_words and example.label is not None:
        found["answer"] = _candidate_text(example, found["prediction"], tokenizer)
    return found


def _answers(
    engine: Engine, examples: Sequence[Example], progress: ScoringProgress, **options: Any
) -> list[str]:
    """Let the model answer each prompt, with `options` of `generate_greedy`."""
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        progress(done, len(examples))

    def generate(prompts: Sequence[Any]) -> list[str]:
        with engine.plain() as model:
            return generate_greedy(
                causal_model(model), prompts=prompts, progress=advance, most=engine.most, **options
            )

    texts: list[str] = engine.spread([example.prompt for example in examples], generate)
    return texts


def _check_rows(names: Sequence[str], examples: Sequence[Example], *, is_labelled: bool) -> None:
    """Raise for no rows, and for a metric that they cannot give: by label, or by gold answers."""
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
    """Return what a candidate stands for, else its own words."""
    if example.names:
        return example.names[index]
    tokens = [
        t for start, end in example.scored[index] for t in example.sequences[index][start:end]
    ]
    return str(_required(tokenizer).decode(tokens, skip_special_tokens=True)).strip()


def values(found: Evaluation, metric: str) -> list[float]:
    """Return what is averaged over rows by `weights_of`; nothing of a metric that is no such mean.

    The loss of a row is that of its right candidate among all, or a token's on average.
    """
    rows = found.predictions
    if metric == "accuracy":  # a half of a pair whose answers are ranked the same
        chosen = [(row["prediction"], row["label"]) for row in rows]
        return [0.5 if found is None else float(found == label) for found, label in chosen]
    if metric == "loss":
        return [_loss(row) for row in rows]
    return _in_words(metric, rows) if metric in TEXT_METRICS else []


def _in_words(metric: str, rows: Sequence[dict[str, Any]]) -> list[float]:
    judge = TEXT_METRICS[metric]
    return [judge(row.get("answer", row["prediction"]), row["references"]) for row in rows]


def weights_of(found: Evaluation, metric: str) -> list[int]:
    """Return how much each row counts in the mean: of a loss per token, its tokens."""
    return [row.get("tokens", 1) if metric == "loss" else 1 for row in found.predictions]


def standard_error(numbers: Sequence[float], weights: Sequence[int]) -> float:
    """Return that of a weighted mean, by linearisation; infinite for a single number."""
    if len(numbers) < 2:
        return math.inf
    mean, pairs = _mean(numbers, weights), zip(numbers, weights, strict=True)
    squares = math.fsum((weight * (each - mean)) ** 2 for each, weight in pairs)
    return math.sqrt(squares * len(numbers) / (len(numbers) - 1)) / sum(weights)


def _mean(numbers: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(map(mul, numbers, weights)) / sum(weights)


def _loss(row: dict[str, Any]) -> float:
    scores, label = row["scores"], row["label"]
    if "loss" in row:
        return float(row["loss"])
    return float(-scores[0]) if label is None else cross_entropy(scores, label)
