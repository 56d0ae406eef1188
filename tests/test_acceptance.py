"""`accept_links: better`: a link that brings nothing is dropped, and the chain ends before it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from helpers import Stop, assert_same_links

from chainlora import load_run, train
from chainlora.data.examples import Example
from chainlora.errors import ConfigError
from chainlora.evaluation.evaluate import Evaluation, evaluate, gain
from chainlora.evaluation.pair_scores import judge_pairs
from chainlora.training import loop


def test_a_gain_is_clear_beyond_its_standard_error():
    def scored(losses):
        rows = [{"label": None, "scores": [-loss]} for loss in losses]
        return Evaluation({}, len(rows), rows)

    found = gain(scored([3.0, 1.0, 2.0]), scored([2.0, 0.5, 1.5]))
    assert found.mean == pytest.approx(2 / 3)
    assert found.standard_error == pytest.approx(math.sqrt((1 / 12) / 3))
    assert found.is_clear
    assert not gain(scored([1.0, 2.0]), scored([0.0, 2.9])).is_clear
    assert not gain(scored([1.0]), scored([0.0])).is_clear  # one row says nothing


def test_a_gain_is_that_of_the_metric():
    """Of a loss per token long rows count for more; shown by two models and rows of all lengths."""
    rows = [Example(k, (tuple(range(1, 3 + 4 * k)),), (((1, 2 + 4 * k),),)) for k in range(6)]
    before, after = (evaluate(tiny_model(name), rows, metrics="loss") for name in ("llama", "opt"))
    found = gain(before, after)
    assert found.mean == pytest.approx(before.metrics["loss"] - after.metrics["loss"], abs=1e-6)
    tokens = np.array([1 + 4 * k for k in range(6)])
    then, now = ([row["scores"][0] for row in each.predictions] for each in (before, after))
    gains = np.array(now) - np.array(then)
    rest = tokens * (gains - found.mean)  # the delta method, for a ratio of two means
    assert found.standard_error == pytest.approx(rest.std(ddof=1) * 6**0.5 / tokens.sum())


def test_a_pair_whose_answers_are_ranked_the_same_is_right_by_half():
    rows = [Example(0, ((1, 2), (1, 3)), (((1, 2),),) * 2)] * 2
    before = judge_pairs(rows, [[-1.0, -1.0]] * 2, [[-1.0, -1.0]] * 2, 1.0)
    after = judge_pairs(rows, [[-1.0, -2.0], [-2.0, -1.0]], [[-1.0, -1.0]] * 2, 1.0)
    found = gain(before, after, "accuracy")
    assert (found.mean, before.metrics["accuracy"], after.metrics["accuracy"]) == (0, 0.5, 0.5)


def accepting(configure, name: str | None = "run", **train_keys):
    keys = {"lr": 1e-2, "accept_links": "better", "save_every": 1} | train_keys
    return configure(name, chain={"ranks": [4, 4, 4], "steps": [8, 4, 2]}, train=keys)


def rejecting(monkeypatch, since=8):
    """Let every link after the first be harmful: from a step on its rate is far too large."""

    real = loop.rate_factor

    def rate(train_config, lengths, number):
        is_harmless = number < since
        return real(train_config, lengths, number) if is_harmless else 1.0 / train_config.lr

    monkeypatch.setattr(loop, "rate_factor", rate)


def test_a_harmful_link_is_dropped_and_the_chain_ends(configure, tmp_path, monkeypatch):
    rejecting(monkeypatch)
    run, seen = tmp_path / "run", []
    result = train(accepting(configure), listener=seen.append)
    (rejected,) = [event for event in seen if event.name == "rejected"]
    assert (rejected.step, rejected.link) == (12, 1)
    assert rejected.gain <= rejected.standard_error
    assert [link["num_steps"] for link in result["links"]] == [8]
    assert len(list((run / "links").iterdir())) == 1
    assert result["steps"] == 12  # the third link was never begun
    knots = [event for event in seen if event.name == "eval" and event.where == "knot"]
    assert result["metrics"]["validation"]["loss"] == knots[0].metrics["loss"]
    alone = train(accepting(configure, "alone", accept_links="all"))
    assert len(alone["links"]) == 3
    model, _ = load_run(run)
    first, _ = load_run(tmp_path / "alone", num_links=1)
    for mine, theirs in zip(model.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # exactly the weights before the rejected link


def test_the_best_point_is_none_of_a_rejected_link(configure, monkeypatch):
    """Before the rejected link did harm, it was better for two steps."""
    rejecting(monkeypatch, since=10)
    seen, keys = [], {"eval_every": 1, "select_metric": "loss"}
    result = train(accepting(configure, None, **keys), listener=seen.append)
    losses = {event.step: event.metrics["loss"] for event in seen if event.name == "eval"}
    assert losses[10] < losses[8] < losses[12]
    kept = {"step": 8, "num_links": 1, "partial": False, "metric": "loss", "value": losses[8]}
    assert (result["best"], len(result["links"])) == (kept, 1)


def test_one_validation_row_is_refused_by_which_every_link_would_be_dropped(
    configure, sentiment, tmp_path
):
    rows = (sentiment / "validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text(rows[0])
    tree = accepting(configure).model_dump(mode="json")
    tree["data"]["validation"] = str(tmp_path / "one.jsonl")
    with pytest.raises(ConfigError, match=r"`accept_links: better` two or more \(got 1\); give"):
        train(tree)
    assert not (tmp_path / "run").exists()


def test_a_link_that_learns_nothing_is_dropped(configure, tmp_path, capsys):
    result = train(accepting(configure, lr=1e-12))
    assert "step     8  link 0 dropped by accept_links: it lowered " in capsys.readouterr().err
    assert (result["links"], result["best"]) == ([], None)
    assert result["steps"] == 8
    model, _ = load_run(tmp_path / "run")  # which is the base then
    base, _ = load_run(tmp_path / "run", num_links=0)
    assert all(map(torch.equal, model.parameters(), base.parameters()))


@pytest.mark.parametrize("dies_at", [8, 12])  # at the knot, and where a link is dropped
def test_killed_and_resumed_it_decides_the_same(configure, tmp_path, monkeypatch, dies_at):
    rejecting(monkeypatch)
    expected, killed = train(accepting(configure, "whole")), accepting(configure, "killed")

    def die(event):
        if event.name in ("step", "rejected") and event.step == dies_at:
            raise Stop

    with pytest.raises(Stop):
        train(killed, listener=die)
    result = train(killed, resume=True)
    assert result["metrics"] == expected["metrics"]
    assert [link["num_steps"] for link in result["links"]] == [8]
    assert_same_links(tmp_path / "whole", tmp_path / "killed")
