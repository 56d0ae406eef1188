"""Score preference pairs: a pair is right if the chosen answer has the larger reward.

The implicit reward of DPO (arXiv 2305.18290, equation 5) is β·log(π(answer)/π_ref(answer)), which
compares the model with its reference. The reward of ORPO needs no reference: it is β times the mean
log-probability per token.
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

Scores = Sequence[Sequence[float]]  # [pairs][2]: mean log-probability per token of both answers


def judge_pairs(
    examples: Sequence[Example], scores: Scores, reference: Scores, beta: float
) -> Evaluation:
    """Return the metrics of pairs, by the scores of a model and of its reference.

    `margin` is the mean of chosen reward minus rejected reward, `loss` the mean of −log σ(margin).
    `accuracy` counts 0.5 for equal rewards, which all pairs have before training. The `scores` of
    predictions are rewards.
    """
    rewards = []
    for example, by_model, by_reference in zip(examples, scores, reference, strict=True):
        counts = [sum(end - start for start, end in spans) for spans in example.scored]  # tokens
        answers = zip(counts, by_model, by_reference, strict=True)
        rewards.append([beta * count * (score - base) for count, score, base in answers])
    return _judged(examples, rewards, [cross_entropy(pair, 0) for pair in rewards])


def judge_odds(
    engine: Engine, examples: Sequence[Example], beta: float, progress: ScoringProgress | None
) -> Evaluation:
    """Return the metrics of pairs as `judge_pairs` does; `loss` is the mean of `orpo_losses`."""
    scores = engine.scores(list(map(with_whole_row, examples)), progress=progress)
    losses = orpo_losses(torch.tensor(scores, dtype=torch.float64), beta).tolist()
    return _judged(examples, [[beta * score for score in pair[:2]] for pair in scores], losses)


def with_whole_row(pair: Example) -> Example:
    """Return a pair with a third sequence for `orpo_losses`: the chosen row, all of it scored."""
    whole = pair.sequences[0]
    sequences, scored = (*pair.sequences, whole), (*pair.scored, ((1, len(whole)),))
    return replace(pair, sequences=sequences, scored=scored)


def orpo_losses(scores: Tensor, beta: float) -> Tensor:
    """Return the losses of pairs, [pairs] (arXiv 2403.07691, equations 6 to 8), differentiable.

    −log P(chosen row) − β·log σ(log odds(chosen) − log odds(rejected)), odds(P) = P / (1 − P)

    Args:
        scores: mean log-probabilities per token (log P), [pairs, 3]: of the chosen answer, the
            rejected answer, and the chosen row with its prompt (like the authors and TRL).
        beta: λ of the paper.
    """
    answers = scores[:, :2].clamp(max=-torch.finfo(torch.float32).eps)  # P = 1 has no odds
    chosen, rejected = (answers - torch.log(-torch.expm1(answers))).unbind(1)
    return -scores[:, 2] - beta * logsigmoid(chosen - rejected)


def _judged(
    examples: Sequence[Example], rewards: Sequence[Sequence[float]], losses: Sequence[float]
) -> Evaluation:
    """Return the metrics of pairs, with rewards as the scores of predictions."""
    margins = [chosen - rejected for chosen, rejected in rewards]
    totals = {
        "loss": math.fsum(losses),
        "accuracy": math.fsum((m > 0) + 0.5 * (m == 0) for m in margins),
        "margin": math.fsum(margins),
    }
    # the index of the answer with the larger reward; None if both are equal
    chosen = [None if margin == 0 else int(margin < 0) for margin in margins]
    columns = zip(examples, chosen, rewards, losses, strict=True)
    predictions = [
        {"row": e.row, "label": 0, "prediction": index, "scores": pair, "loss": loss}
        for e, index, pair, loss in columns
    ]
    metrics = {name: total / len(predictions) for name, total in totals.items()}
    return Evaluation(metrics, len(predictions), predictions)
