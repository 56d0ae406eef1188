"""Metrics, and the matrix of stages' scores: worked by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from chainlora.data.examples import Example
from chainlora.data.tasks import WORD_METRICS, Metric
from chainlora.errors import ConfigError
from chainlora.evaluation.metrics import (
    INDEX_METRICS,
    LOSS_METRICS,
    TEXT_METRICS,
    check_metrics,
    exact_match,
    is_higher_better,
    macro_f1,
    majority_rate,
    normalize_answer,
    perplexity,
    token_f1,
)
from chainlora.evaluation.stage_scores import MatrixSummary, summarise_matrix


def test_answers_are_normalised_as_squad_does():
    assert normalize_answer("The  Quick, brown-fox\tof a An") == "quick brownfox of"
    assert exact_match("the Eiffel Tower!", ["Louvre", "Eiffel tower"]) == 1
    assert exact_match("Eiffel", ["Eiffel Tower"]) == 0
    # 1 of 3 words, 1 of 1
    assert token_f1("in the year 1889", ["1889", "year 1888"]) == pytest.approx(0.5)
    assert token_f1("the", ["a"]) == 1
    assert token_f1("the", ["tower"]) == 0
    assert token_f1("anything", []) == 0


def test_macro_f1_is_the_mean_over_classes():
    # class 0: precision 2/3, recall 1 → 0.8; class 1: 1, 1/2 → 2/3; class 2 never right → 0
    assert macro_f1([0, 0, 1, 1, 2], [0, 0, 1, 0, 1]) == pytest.approx(
        (2 * 2 / 5 + 2 * 1 / 4 + 0) / 3
    )
    assert macro_f1([1, 1], [1, 1]) == 1
    rows = [Example(0, (), (), label) for label in (0, 0, 1, 1, 1, 2)]
    assert majority_rate(rows, "accuracy") == 3 / 6
    assert majority_rate(rows, "f1") == pytest.approx((2 * 3 / (3 + 6)) / 3)  # two classes are 0


def test_perplexity_does_not_overflow():
    assert perplexity(0) == 1
    assert perplexity(1e4) == math.inf


def test_a_task_file_can_name_every_metric():
    assert {*get_args(Metric)} == {*INDEX_METRICS, *TEXT_METRICS, "loss"}
    assert set(WORD_METRICS) == TEXT_METRICS.keys()


def test_names_are_checked_and_have_a_direction():
    assert check_metrics("em") == ("em",)
    assert check_metrics(["f1", "loss"]) == ("f1", "loss")
    with pytest.raises(ConfigError, match="did you mean 'token_f1'"):
        check_metrics(["accuracy", "tokenf1"])
    assert is_higher_better("accuracy")
    assert not any(map(is_higher_better, LOSS_METRICS))


# --- the matrix

# Row 0 is the base; stage j is learned in row j + 1.
ACCURACY = [[0.5, 0.2, 0.1], [0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]]


def test_three_stages():
    (found,) = summarise_matrix(ACCURACY, ["a", "b", "c"], ["accuracy"] * 3, [1, 2, 3])
    assert found.average == pytest.approx((0.6 + 0.7 + 0.9) / 3)
    assert found.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    assert not found.is_turned


def test_metrics_stand_apart_and_losses_are_turned():
    scores = [[3.0, 0.2, 2.0], [1.0, 0.3, 2.5], [2.0, 0.8, 2.0], [4.0, 0.7, 1.0]]
    metrics = ["loss", "accuracy", "loss"]
    accuracy, loss = summarise_matrix(scores, ["a", "b", "c"], metrics, [1, 2, 3])
    assert (loss.stages, accuracy.stages) == (("a", "c"), ("b",))
    assert loss == MatrixSummary("loss", ("a", "c"), True, -2.5, -3.0, 3.0)
    assert str(loss).startswith("minus the loss: average -2.5000, ")
    assert accuracy.forgetting == pytest.approx(0.1)


def test_what_the_base_did_better_was_not_learned_and_is_not_forgotten():
    scores = [[0.9, 0.1], [0.6, 0.2], [0.6, 0.8]]
    (found,) = summarise_matrix(scores, ["a", "b"], ["accuracy"] * 2, [1, 2])
    assert (found.backward_transfer, found.forgetting) == (0, 0)


def test_one_stage_forgets_nothing():
    (found,) = summarise_matrix([[0.5], [0.9]], ["a"], ["f1"], [1])
    assert found == MatrixSummary("f1", ("a",), False, 0.9, None, None)
