"""docs/layout.md: the packages there are, and its recipes, run in both loops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import settings
from helpers_integrations import make_trainer, peft_model
from transformers import AutoTokenizer

import chainlora
from chainlora import ChainCallback
from chainlora.knots import driver
from chainlora.training import objectives, optimizers
from chainlora.training.events import Event, KnotTied, ShareTied, StepDone

ROOT = Path(chainlora.__file__).parents[2]
LAYOUT = (ROOT / "docs/layout.md").read_text(encoding="utf-8")


def run_recipe(word: str) -> None:
    """Run the one Python block of the page that has a word."""
    found = [b for b in re.findall(r"```python\n(.*?)```", LAYOUT, re.DOTALL) if word in b]
    assert len(found) == 1
    exec(compile(found[0], word, "exec", dont_inherit=True), {"__name__": f"recipe_{word}"})


def events_of(config: dict[str, Any]) -> list[Event]:
    events: list[Event] = []
    chainlora.train(chainlora.make_config(config), listener=events.append)
    return events


def losses_of(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def test_an_optimizer_of_ones_own(tiny_folder, sentiment, monkeypatch):
    monkeypatch.setitem(optimizers.OPTIMIZERS, "signum", None)  # taken out again at the end
    run_recipe("class Signum")
    knots = {"ranks": [4], "steps": [12], "knots": {"every": 3, "share": 0.3}}
    train = {"optimizer": "signum", "lr": 3e-3}
    events = events_of(settings(tiny_folder, sentiment, chain=knots, train=train))
    assert sum(losses_of(events)[-3:]) < sum(losses_of(events)[:3])
    assert sum(isinstance(event, ShareTied) for event in events) == 3


@pytest.fixture
def doubling(monkeypatch):
    monkeypatch.setitem(driver.POLICIES, "doubling", None)
    run_recipe("class DoublingKnots")
    return {"policy": "doubling", "every": 4, "share": 0.5}


def test_a_knot_policy_of_ones_own_in_our_loop(tiny_folder, sentiment, doubling):
    keys = {"ranks": [4], "steps": [20], "knots": doubling}
    events = events_of(settings(tiny_folder, sentiment, chain=keys))
    assert [event.step for event in events if isinstance(event, ShareTied)] == [4, 8, 16]
    (end,) = [event for event in events if isinstance(event, KnotTied)]
    assert end.step == 20
    assert end.function_change < 1e-2  # the tolerance of a link with soft knots


def test_the_same_knot_policy_in_a_trainer(tiny_folder, doubling, tmp_path, monkeypatch):
    steps = []
    tie_share = chainlora.Chain.tie_share

    def seen(chain, share):
        steps.append((chain.live_steps, share))
        return tie_share(chain, share)

    monkeypatch.setattr(chainlora.Chain, "tie_share", seen)
    callback = ChainCallback(knots=doubling)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    make_trainer(peft_model(tiny_folder), tokenizer, tmp_path, callback, max_steps=20).train()
    assert steps == [(4, 0.5), (8, 0.5), (16, 0.5)]
    assert callback.chain.live_steps == 20


def test_an_objective_of_ones_own(tiny_folder, sentiment, monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "margin", None)
    run_recipe("class Margin")
    margin = objectives.OBJECTIVES["margin"]
    monkeypatch.setitem(objectives.OBJECTIVES, "candidates", margin)  # the name in the task file
    events = events_of(settings(tiny_folder, sentiment, chain={"ranks": [4], "steps": [20]}))
    losses = losses_of(events)
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # nothing is learned yet: about the margin
    assert sum(losses[-4:]) < sum(losses[:4])
