"""The plug-ins of examples/plugins (docs/layout.md), in both loops and from the command line."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Stop, records_of, settings, stage_dir, stopping
from helpers_integrations import make_trainer, peft_model
from test_docs import ROOT

import chainlora
from chainlora import ChainCallback, registry, train
from chainlora.knots import policy
from chainlora.training import objectives, optimizers
from chainlora.training.events import Event, StepDone

PLUGINS = {file.stem: file for file in (ROOT / "examples/plugins").glob("*.py")}


def run_plugin(name: str) -> None:
    runpy.run_path(str(PLUGINS[name]), run_name=f"plugin_{name}")


@pytest.fixture
def mine(tmp_path):
    """A file with all three plug-ins, in the working directory; what it registers ends with the
    test."""
    tables = policy.POLICIES, objectives.OBJECTIVES, optimizers.OPTIMIZERS
    before = [dict(table) for table in tables]
    (tmp_path / "mine.py").write_text(
        "\n\n".join(file.read_text("utf-8") for file in PLUGINS.values())
    )
    yield tmp_path / "mine.py"
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    registry._load.cache_clear()


@pytest.fixture
def config(mine, tiny_folder, sentiment):
    """A config file of the command line."""
    steps = {"ranks": [2], "steps": [5]}
    tree = settings(tiny_folder, sentiment, "run", chain=steps, train={"save_every": 2})
    mine.with_name("run.yaml").write_text(yaml.safe_dump(tree))
    return tree


OWN = ("--train.optimizer", "signum", "--train.loss", "margin")
OWN += ("--chain.knots", "{policy: doubling, every: 2, share: 0.5}")


def events_of(config: dict[str, Any]) -> list[Event]:
    events: list[Event] = []
    train(config, listener=events.append)
    return events


def losses_of(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def test_a_knot_policy_of_ones_own_in_a_trainer(tiny_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(policy.POLICIES, "doubling", None)
    run_plugin("doubling")
    steps = []
    tie_share = chainlora.Chain.tie_share

    def seen(chain, share):
        steps.append((chain.live_steps, share))
        return tie_share(chain, share)

    monkeypatch.setattr(chainlora.Chain, "tie_share", seen)
    callback = ChainCallback(knots={"policy": "doubling", "every": 4, "share": 0.5})
    make_trainer(peft_model(tiny_folder), tokenizer, tmp_path, callback, max_steps=20).train()
    assert steps == [(4, 0.5), (8, 0.5), (16, 0.5)]
    assert callback.chain.live_steps == 20


def test_an_objective_of_ones_own(tiny_folder, sentiment, monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "margin", None)
    run_plugin("margin")
    margin = objectives.OBJECTIVES["margin"]
    monkeypatch.setitem(objectives.OBJECTIVES, "candidates", margin)  # the name in the task file
    events = events_of(settings(tiny_folder, sentiment, chain={"ranks": [4], "steps": [20]}))
    losses = losses_of(events)
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # nothing is learned yet: about the margin
    assert sum(losses[-4:]) < sum(losses[:4])


# --- from the command line ---


def test_a_file_of_ones_own_is_named_by_plugins(config, chainlora, caplog):
    chainlora("train", "run.yaml", *OWN).refused("`train.loss` must be one of", "in `plugins`")
    for key, value in zip(OWN[2::2], OWN[3::2], strict=True):
        chainlora("train", "run.yaml", key, value).refused(f"`{key[2:8]}", "got '", "in `plugins`")
    done = chainlora("train", "run.yaml", *OWN, "--plugins", "mine.py")
    assert done.status == 0, done.err
    assert "loaded plug-in mine.py" in caplog.messages
    assert [e["event"] for e in records_of(Path("run"))].count("soft_knot") == 2  # steps 2 and 4
    saved = yaml.safe_load((stage_dir(Path("run")) / "config.yaml").read_text())
    assert saved["plugins"] == ["mine.py"]
    assert chainlora("eval", "run").status == 0  # by the metrics of its task


def test_a_run_names_its_plugins_and_never_runs_them(config, mine, chainlora, caplog):
    own = {"plugins": ["mine.py"], "train": config["train"] | {"optimizer": "signum"}}
    with pytest.raises(Stop):
        train(config | own, listener=stopping(2))

    def forget() -> None:
        registry._load.cache_clear()
        del optimizers.OPTIMIZERS["signum"]

    forget()
    resume = ("train", "run/stages/main/config.yaml", "--resume")
    chainlora(*resume).refused("Cannot resume run", "Add --plugins mine.py if you trust it")
    assert "signum" not in optimizers.OPTIMIZERS
    more = ("extend", "run", "--chain.ranks", "2", "--chain.steps", "1")
    more += ("--data.task", config["data"]["task"], "--data.train", config["data"]["train"])
    chainlora(*more, "--name", "more").refused(
        "whose first stage has ended (got run); finish that stage"
    )
    assert "signum" not in optimizers.OPTIMIZERS
    mine.write_text(mine.read_text() + "\n")
    # it has moved, and changed
    chainlora(*resume, "--plugins", mine).refused("Cannot resume run")
    done = chainlora(*resume, "--plugins", "mine.py")
    assert done.status == 0, done.err
    assert "another content of mine.py" in caplog.text
    forget()
    named = (*more, "--name", "more")
    chainlora(*named).refused("Cannot extend run", "Add --plugins mine.py if you trust it")
    assert "signum" not in optimizers.OPTIMIZERS
    assert chainlora(*named, "--plugins", "mine.py").status == 0
    forget()
    plain = ("--name", "plain", "--train.optimizer", "adamw", "--plugins", "[]")
    assert chainlora(*more, *plain).status == 0
    assert "signum" not in optimizers.OPTIMIZERS


def test_a_comparison_has_methods_of_ones_own(config, chainlora):
    methods = "--methods.margin.train.loss", "margin", "--methods.signum.train.optimizer", "signum"
    words = ("compare", "run.yaml", "--chain.steps", "2", "--seeds", "1", "--backend", "inline")
    words += ("--methods", "lora,margin,signum", *methods)
    chainlora(*words).refused("`train.loss` must be one of")
    done = chainlora(*words, "--plugins", "mine.py")
    assert done.status == 0, done.err
    assert "cells and report in run-compare\n" in done.err
    assert Path("run-compare/report.html").is_file()
    for method in ("lora", "margin", "signum"):
        assert re.search(rf"^\| {method} \| [\d.]+ \(1\) \|$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.py", None, "Cannot load the plug-in none.py (FileNotFoundError: "),
        ("mine.py", "import nothing_here", "(ModuleNotFoundError: No module named 'nothing_here')"),
        ("mine.py", "x = (", "(SyntaxError: '(' was never closed"),
        ("no_such.module", None, "(ModuleNotFoundError: No module named 'no_such'); correct it"),
        ("no_such", None, "no such module; write a file with its .py); correct it"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_named(name, text, says, config, mine, chainlora):
    if text is not None:
        mine.write_text(text)
    chainlora("train", "run.yaml", "--plugins", name).refused(says)
    assert not Path("run").exists()
