"""Scores of pairs of preferences, by DPO's implicit reward (arXiv 2305.18290, equation 5).

The reward of an answer is β·log(π(answer)/π_ref(answer)): by how much more likely a model finds it
than its reference does. A pair is right where the chosen answer has the larger reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chainlora.data.examples import Example
from chainlora.evaluation.evaluate import Evaluation
from chainlora.evaluation.metrics import cross_entropy

Scores = Sequence[Sequence[float]]  # of each pair: mean log-probability per token of both answers


def judge_pairs(
    examples: Sequence[Example], scores: Scores, reference: Scores, beta: float
) -> Evaluation:
    """Return the metrics of pairs whose answers are scored by a model and by its reference.

    `loss` is the mean of −log σ(margin) and `margin` that of the chosen reward less the rejected
    one; `accuracy` counts half where both are equal, as they are before training. The `scores` of
    predictions are rewards.
    """
    rewards = [
        [beta * n * (ours - theirs) for n, ours, theirs in zip(_lengths(e), *found, strict=True)]
        for e, *found in zip(examples, scores, reference, strict=True)
    ]
    margins = [chosen - rejected for chosen, rejected in rewards]
    totals = {
        "loss": math.fsum(cross_entropy(pair, 0) for pair in rewards),
        "accuracy": math.fsum((m > 0) + 0.5 * (m == 0) for m in margins),
        "margin": math.fsum(margins),
    }
    predictions = [
        {"row": example.row, "label": 0, "prediction": int(margin < 0), "scores": pair}
        for example, margin, pair in zip(examples, margins, rewards, strict=True)
    ]
    metrics = {name: total / len(rewards) for name, total in totals.items()}
    return Evaluation(metrics, len(rewards), predictions)


def _lengths(example: Example) -> list[int]:
    return [sum(end - start for start, end in spans) for spans in example.scored]
