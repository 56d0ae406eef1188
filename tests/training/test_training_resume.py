"""A run that is killed, stopped or not finite: what it leaves, and that it resumes to the same
links."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from helpers import Stop, assert_same_links, assert_same_records, settings, stage_dir
from safetensors.torch import load_file

from chainlora import train
from chainlora.errors import TrainingError
from chainlora.knots.policy import POLICIES, WHOLE

SOFT = {"knots": {"every": 1, "share": 0.3}}
BEST = {"keep_best": True}
RELORA = {"optimizer": "relora", "optimizer_options": {"rise": 3}}
HALF = {"dtype": "bfloat16"}
KILLED = {
    "plain": {},
    "dropout, gradient": {"chain": {"dropout": 0.1, "init": "gradient"}, "train": HALF},
    "ReLoRA, best": {"chain": {"ranks": [4, 4, 4]}, "train": BEST | RELORA},
    "PiSSA, accumulation": {
        "chain": {"init": "pissa"},
        "train": {"gradient_accumulation": 2, "batch_size": 4},
    },
    "soft knots, best": {"chain": SOFT, "train": BEST | HALF},
    "soft knots, carried, SGD": {
        "chain": SOFT | {"hold": "carried"},
        "train": {"optimizer": "sgd"},
    },
}
NUM_DEATHS = 3
QUICK = ("ReLoRA, best", "soft knots, best")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in KILLED]
)
def test_law_9_killed_anywhere_and_resumed_is_the_uninterrupted_run(
    tiny_folder, sentiment, tmp_path, name
):
    """At records (steps, evaluations, knots) drawn at random; at file operations: tests/faults."""
    draw = random.Random(name)
    tree = settings(tiny_folder, sentiment, **KILLED[name])
    tree["chain"]["steps"] = [6, 6, 4]
    tree["train"] |= {"save_every": 2, "eval_every": 3}
    whole = train(tree | {"output": str(tmp_path / "whole")})
    killed = tree | {"output": str(tmp_path / "killed")}
    for _ in range(NUM_DEATHS):
        resume, listener = (tmp_path / "killed").exists(), dies_after(draw.randrange(3, 7))
        with pytest.raises(Stop):
            train(killed, resume=resume, listener=listener)
    found = train(killed, resume=True)
    assert_same_links(tmp_path / "whole", tmp_path / "killed")
    assert all(found[key] == whole[key] for key in ("metrics", "best", "links"))
    assert_same_records(tmp_path / "whole", tmp_path / "killed")


def dies_after(num_records: int):
    seen = []

    def listener(record) -> None:
        seen.append(record)
        if len(seen) == num_records:
            raise Stop

    return listener


def interrupting(event: str):
    def listener(seen) -> None:
        if seen["event"] == event:
            raise KeyboardInterrupt

    return listener


def test_a_run_killed_between_its_early_stop_and_the_knot_still_ties_the_link(configure, tmp_path):
    """By a start that reads rows again at the resume."""
    keys = {"lr": 1e-9, "early_stop": 2, "eval_every": 1, "save_every": 1}
    keys = {"train": keys, "chain": {"init": "gradient"}}
    train(configure("whole", **keys))
    config = configure("killed", **keys)
    with pytest.raises(KeyboardInterrupt):
        train(config, listener=interrupting("knot"))
    assert train(config, resume=True)["steps"] == 3
    assert_same_links(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("warmup", "good"), [(0, None), (1, 1)])
def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(configure, tmp_path, warmup, good):
    keys = {"lr": 1e3, "schedule": "constant", "max_grad_norm": None, "save_every": 1}
    keys |= {"optimizer_options": {"weight_decay": 1e38}}  # the first update overflows
    keys |= {"warmup_steps": warmup}  # the first step of a warm-up has rate 0
    said = r"must be finite \(got .* at step \d+, link \d\).*is kept in"
    with pytest.raises(TrainingError, match=said):
        train(configure(train=keys))
    checkpoints = stage_dir(tmp_path / "run") / "checkpoints"
    if good is None:  # the first step broke the weights: the run starts over
        assert not checkpoints.exists()
        return
    (kept,) = checkpoints.iterdir()
    assert kept.name == f"{good:08d}"
    state = load_file(kept / "link.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize("event", ["plan", "step", "knot", "eval"])
def test_an_interrupted_run_leaves_nothing_running(configure, event):
    """Ctrl-C left packing threads, worker threads and trackers behind."""
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        train(configure(), listener=interrupting(event))
    assert set(threading.enumerate()) == before


class EndsEarly:
    """A policy of somebody's own: the first link ends after two steps, which it counts itself."""

    def knot_after(self, position):
        assert position.norm() > 0
        position.memory["steps"] = position.memory.get("steps", 0) + 1
        return WHOLE if position.link == 0 and position.memory["steps"] == 2 else None


def test_a_link_may_end_early_and_the_last_one_makes_up_for_it(configure, tmp_path, monkeypatch):
    """Also in a run that dies in the last step of that link, and at its knot: what the policy notes
    is saved."""
    monkeypatch.setitem(POLICIES, "early", lambda knots: EndsEarly())
    config = configure(chain={"knots": {"policy": "early"}}, train={"save_every": 1})
    for dies_at in (2, "knot"):

        def die(event, at=dies_at) -> None:
            if at in (event["event"], event["step"]):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(config, listener=die, resume=dies_at == "knot")
    result = train(config, resume=True)
    assert [link["num_steps"] for link in result["links"]] == [2, 4, 5]
    assert result["steps"] == 11
    train(configure("planned", chain={"steps": [2, 4, 5]}))
    assert_same_links(tmp_path / "run", tmp_path / "planned")  # rates and rows too
