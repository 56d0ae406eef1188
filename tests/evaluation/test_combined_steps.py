"""Steps of a combination: its link is trained on kept rows; the base teaches on general rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from faults.lives import live
from helpers import train_all, train_on
from helpers_stages import config_of, die, section, train_beside
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from chainlora import load_run
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.engine.head import divergence
from chainlora.errors import RunError
from chainlora.runs.addresses import open_run
from chainlora.training.stages import combine, prune

STEPS = 12


@pytest.fixture(scope="module")
def trained(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run of a, b and c beside each other, with general rows, combined without steps."""
    folder = tmp_path_factory.mktemp("steps")
    texts = [{"text": "two red birds fly over the hill"}, {"text": "one cat sat on a mat"}]
    config = config_of(tiny_folder, sentiment, folder / "run")
    general = {"train": str(write_rows(folder / "general.jsonl", texts))}
    train_all(config | {"start_data": general})
    for name in "bc":
        train_beside(sentiment, folder / "run", name)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def losses(run: Path) -> dict[str, float]:
    """Return the loss of each part's kept training rows in the current state."""
    model, _ = load_run(run)
    with Engine(model, training=False) as engine:
        kept = open_run(run).kept()
        batches = {name: engine.pack([row.right for row in kept[name].train]) for name in "abc"}
        with engine.plain():
            sums = {name: engine.loss(batch, "completion") for name, batch in batches.items()}
    return {name: float(total) / count for name, (total, count) in sums.items()}


def link_of(run: Path) -> dict[str, Any]:
    (link,) = open_run(run).links()
    return {name: (f.a, f.b) for name, f in link.factors.items()}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    for name, factors in one.items():
        assert all(map(torch.equal, factors, two[name])), name


def test_they_train_the_link_and_keep_its_rank(run):
    before, closed = open_run(run), losses(run)
    after = combine(run, steps=40)
    assert after.facts[0].rank == before.facts[0].rank
    assert (after.facts[0].num_steps, after.entry.how.steps) == (40, 40)
    found = losses(run)
    assert sum(found.values()) < sum(closed.values())
    assert not (run / "stages" / after.key).exists()  # the point that a kill leaves


def test_they_depend_on_the_parts_alone(run, tmp_path):
    """Not on the order of their names, nor on a stage that was pruned."""
    combine(run, steps=STEPS)
    prune(run, "b")
    pruned = link_of(run)
    assert open_run(run).entry.how.steps == STEPS
    combine(run, ["c", "a"], steps=STEPS, output=tmp_path / "other")
    assert_same(pruned, link_of(tmp_path / "other"))


def test_a_stage_that_is_added_keeps_them(run, sentiment):
    combine(run, steps=2)
    train_on(run, section(sentiment, "d"), beside=True)
    assert open_run(run).entry.how.steps == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize("at", [("layer", 1), ("step", STEPS - 1)])
def test_a_kill_resumes_to_the_same_bits(run, tmp_path, at):
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    combine(whole, steps=STEPS)

    def progress(parts: str, done: int, count: int) -> None:
        if (parts.rpartition(": ")[2], done) == at:
            die()

    assert live(lambda: combine(run, steps=STEPS, progress=progress)).status == -9
    seen = list[str]()
    combine(run, steps=STEPS, progress=lambda parts, done, count: seen.append(f"{parts} {done}"))
    assert any(": layer" in line for line in seen) == (at[0] == "layer")  # else it resumes
    assert_same(link_of(whole), link_of(run))


def test_the_divergence_is_that_of_all_logits(tiny_folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    with Engine(model, training=True) as engine:
        texts = ((5, 6, 7, 8), (9, 10, 11))
        rows = [Example(0, (tokens,), (((1, len(tokens)),),)) for tokens in texts]
        batch = engine.pack(rows)
        hidden = engine.hidden(batch)
        teacher = torch.randn(batch.num_scored_tokens, hidden.shape[1])
        found = divergence(model, hidden, batch, teacher)
        logits = [model(torch.tensor([row.sequences[0]])).logits[0, :-1] for row in rows]
    logs = F.log_softmax(torch.cat(logits), -1)
    wanted = F.log_softmax(model.lm_head(teacher), -1)
    expected = (wanted.exp() * (wanted - logs)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)  # float32 sums of 5 × 320


def test_they_are_an_option(run, chainlora):
    said = chainlora(f"combine {run} --steps 2 --json")
    assert said.status == 0
    assert json.loads(said.out)["of"] == ["a", "b", "c"]
    assert open_run(run).entry.how.steps == 2
    with pytest.raises(RunError, match="must be 0 or more"):
        combine(run, steps=-1)
