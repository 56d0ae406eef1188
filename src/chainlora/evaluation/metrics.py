"""Metrics: pure functions from answers to a number.

Classification metrics compare candidate indices. Text metrics compare answers like the official
script of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, no punctuation, no articles,
single blanks, the best over all references. MeZO (arXiv 2305.17333) uses this token F1 for SQuAD
and DROP.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from chainlora.data.examples import Example
from chainlora.errors import ConfigError, nearest

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Return the share of predictions that equal their label, in 0…1."""
    pairs = zip(labels, predictions, strict=True)
    return sum(label == prediction for label, prediction in pairs) / len(labels)


def macro_f1(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Return the mean F1 over the classes that occur as label or prediction, in 0…1."""
    pairs = zip(labels, predictions, strict=True)
    right = Counter(label for label, prediction in pairs if label == prediction)
    actual, predicted = Counter(labels), Counter(predictions)
    classes = actual.keys() | predicted.keys()
    return math.fsum(2 * right[c] / (actual[c] + predicted[c]) for c in classes) / len(classes)


def normalize_answer(text: str) -> str:
    """Return `text` in lower case, without punctuation and articles, with single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Iterable[str]) -> float:
    """Return 1 if the normalised prediction equals a normalised reference, else 0."""
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(reference) for reference in references))


def token_f1(prediction: str, references: Iterable[str]) -> float:
    """Return the best F1 over the references between bags of normalised words, in 0…1.

    If one side has no words, the F1 is 1 if the other side has none either, else 0 (as in SQuAD
    2.0).
    """
    best, answer = 0.0, normalize_answer(prediction).split()
    for gold in (normalize_answer(reference).split() for reference in references):
        if answer and gold:
            common = (Counter(answer) & Counter(gold)).total()
            best = max(best, 2 * common / (len(answer) + len(gold)))
        elif answer == gold:
            best = 1.0
    return best


def cross_entropy(scores: Sequence[float], label: int) -> float:
    """Return −log softmax(scores)[label]."""
    top = max(scores)
    if top == -math.inf:
        return math.log(len(scores))
    return top + math.log(math.fsum(math.exp(score - top) for score in scores)) - scores[label]


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


INDEX_METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": accuracy,
    "f1": macro_f1,
}
"""Metrics over candidate indices: (labels, predictions) → number."""

TEXT_METRICS: dict[str, Callable[[str, Iterable[str]], float]] = {
    "em": exact_match,
    "token_f1": token_f1,
}
"""Metrics over texts, averaged over rows: (prediction, references) → number."""

LOSS_METRICS = ("loss", "perplexity")
"""Metrics of likelihood: lower is better. `loss` is always reported if rows are scored,
`perplexity` for language-model rows."""


def check_metrics(metrics: Sequence[str] | str) -> tuple[str, ...]:
    """Return the names as a tuple. Raises ConfigError for an unknown metric."""
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    known = (*INDEX_METRICS, *TEXT_METRICS, *LOSS_METRICS)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"metric must be one that chainlora has (got {name!r}){nearest(name, known)}"
            )
    return names


def is_higher_better(metric: str | None) -> bool:
    """Say whether a larger value of a metric is better: true for all but losses."""
    return metric not in LOSS_METRICS


def majority_rate(examples: Iterable[Example], metric: str) -> float:
    """Return the score of always predicting the most frequent label, in 0…1."""
    labels = [example.label for example in examples if example.label is not None]
    ((majority, _),) = Counter(labels).most_common(1)
    return INDEX_METRICS[metric](labels, [majority] * len(labels))
