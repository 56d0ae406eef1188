"""Scores of pairs of preferences: a pair is right where the chosen answer has the larger reward.

DPO's implicit reward of an answer (arXiv 2305.18290, equation 5) is β·log(π(answer)/π_ref(answer)):
by how much more likely a model finds it than its reference does. ORPO's has no reference: it is β
times the mean log-probability per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from chainlora.data.examples import Example
from chainlora.engine.engine import Engine, ScoringProgress
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
    rewards = []
    for example, ours, theirs in zip(examples, scores, reference, strict=True):
        counts = [sum(end - start for start, end in spans) for spans in example.scored]
        answers = zip(counts, ours, theirs, strict=True)
        rewards.append([beta * count * (our - their) for count, our, their in answers])
    return _judged(examples, rewards, [cross_entropy(pair, 0) for pair in rewards])


def judge_odds(
    engine: Engine, examples: Sequence[Example], beta: float, progress: ScoringProgress | None
) -> Evaluation:
    """Return the metrics of pairs as `judge_pairs` does; `loss` is the mean of `orpo_losses`."""
    scores = engine.scores(list(map(with_whole_row, examples)), progress=progress)
    losses = orpo_losses(torch.tensor(scores, dtype=torch.float64), beta).tolist()
    return _judged(examples, [[beta * score for score in found[:2]] for found in scores], losses)


def with_whole_row(pair: Example) -> Example:
    """Return a pair with its chosen sequence once more, all of it scored, for `orpo_losses`."""
    whole = pair.sequences[0]
    sequences, scored = (*pair.sequences, whole), (*pair.scored, ((1, len(whole)),))
    return replace(pair, sequences=sequences, scored=scored)


def orpo_losses(scores: Tensor, beta: float) -> Tensor:
    """Return the losses [E] of pairs (arXiv 2403.07691, equations 6 to 8), differentiable.

    −log P(chosen row) − β·log σ(log odds(chosen) − log odds(rejected)), odds(P) = P / (1 − P)

    Args:
        scores: [E, 3], mean log-probabilities per token (log P): of the chosen and the rejected
            answer, and of the chosen row, prompt included (as the authors and TRL have it).
        beta: λ of the paper.
    """
    answers = scores[:, :2].clamp(max=-torch.finfo(torch.float32).eps)  # P = 1 has no odds
    chosen, rejected = (answers - torch.log(-torch.expm1(answers))).unbind(1)
    return -scores[:, 2] - beta * logsigmoid(chosen - rejected)


def _judged(
    examples: Sequence[Example], rewards: Sequence[Sequence[float]], losses: Sequence[float]
) -> Evaluation:
    """Return the metrics of pairs, and predictions whose scores are rewards."""
    margins = [chosen - rejected for chosen, rejected in rewards]
    totals = {
        "loss": math.fsum(losses),
        "accuracy": math.fsum((m > 0) + 0.5 * (m == 0) for m in margins),
        "margin": math.fsum(margins),
    }
    # the answer with the larger reward; None where neither has
    chosen = [None if margin == 0 else int(margin < 0) for margin in margins]
    columns = zip(examples, chosen, rewards, losses, strict=True)
    said = [
        {"row": e.row, "label": 0, "prediction": index, "scores": pair, "loss": loss}
        for e, index, pair, loss in columns
    ]
    metrics = {name: total / len(said) for name, total in totals.items()}
    return Evaluation(metrics, len(said), said)
