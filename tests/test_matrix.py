"""The matrix of stages' scores: worked by hand."""

from __future__ import annotations

import pytest

from chainlora.evaluation.matrix import MatrixSummary, summarise_matrix

# Row 0 is the base; stage j is learned in row j + 1.
ACCURACY = [[0.5, 0.2, 0.1], [0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]


def test_three_stages():
    (found,) = summarise_matrix(ACCURACY, ["a", "b", "c"], ["accuracy"] * 3)
    assert found.average == pytest.approx((0.6 + 0.7 + 0.9) / 3)
    assert found.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    assert not found.is_turned


def test_metrics_stand_apart_and_losses_are_turned():
    scores = [[3.0, 0.2, 2.0], [1.0, 0.3, 2.5], [2.0, 0.8, 2.0], [4.0, 0.7, 1.0]]
    loss, accuracy = summarise_matrix(scores, ["a", "b", "c"], ["loss", "accuracy", "loss"])
    assert (loss.stages, accuracy.stages) == (("a", "c"), ("b",))
    assert loss == MatrixSummary("loss", ("a", "c"), True, -2.5, -3.0, 3.0)
    assert str(loss).startswith("minus the loss: average -2.5000, ")
    assert accuracy.forgetting == pytest.approx(0.1)


def test_one_stage_forgets_nothing():
    (found,) = summarise_matrix([[0.5], [0.9]], ["a"], ["f1"])
    assert found == MatrixSummary("f1", ("a",), False, 0.9, None, None)
