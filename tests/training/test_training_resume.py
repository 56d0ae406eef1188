"""A run that is killed, stopped, refused late or not finite: what it leaves, what may change before
its resume, and that it resumes to the same links."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    Stop,
    assert_same_links,
    assert_same_records,
    flip_last_bit,
    settings,
    stage_dir,
    stop_after,
)
from safetensors.torch import load_file

from chainlora import load_run, make_config, train
from chainlora.config.staging import Stage
from chainlora.errors import ChainLoRAError, FileError, ModelError, RunError, TrainingError
from chainlora.knots.policy import POLICIES, WHOLE
from chainlora.runs.documents import write_part
from chainlora.runs.draft import read_draft
from chainlora.training.plan import make_plan

SOFT = {"knots": {"every": 1, "share": 0.3}}
BEST = {"keep_best": True}
RELORA = {"optimizer": "relora", "optimizer_options": {"rise": 3}}
HALF = {"dtype": "bfloat16"}
KILLED = {
    "plain": {},
    "dropout, gradient": {"chain": {"dropout": 0.1, "init": "gradient"}, "train": HALF},
    "ReLoRA, best": {"chain": {"ranks": [4, 4, 4]}, "train": BEST | RELORA},
    "accumulation": {"train": {"gradient_accumulation": 2, "batch_size": 4}},
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


# --- the start


def test_what_is_refused_late_leaves_no_run_behind(configure, tmp_path):
    """Whatever fails before the first step, the corrected command must find its output free."""
    config = configure()

    def fail(event, at: str = "eval") -> None:
        if event.name == at:
            raise ChainLoRAError("late")

    with pytest.raises(ChainLoRAError, match="late"):
        train(config, listener=fail)
    assert not (tmp_path / "run").exists()
    stop_after(config, 2)
    assert (tmp_path / "run").exists()  # something was learned
    with pytest.raises(ChainLoRAError, match="late"):
        train(config, resume=True, listener=partial(fail, at="plan"))
    assert (tmp_path / "run" / "history.json").exists()


# --- what changes between a run and its resume


def test_a_base_that_changed_is_refused_everywhere(tiny_folder, sentiment, tmp_path):
    """What makes a base what it is: test_identity.py."""
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    keys = {"ranks": [2, 2], "steps": [1, 1]}
    finished, stopped = (
        make_config(settings(base, sentiment, tmp_path / name, chain=keys))
        for name in ("finished", "stopped")
    )
    train(finished)
    stop_after(stopped, 1)
    flip_last_bit(base / "model.safetensors")
    for act in (lambda: load_run(tmp_path / "finished"), lambda: train(stopped, resume=True)):
        with pytest.raises(RunError, match=r"\(got another model.safetensors\); restore it, or"):
            act()


def test_a_run_goes_on_where_its_base_and_rows_lie_now(
    configure, tiny_folder, sentiment, tmp_path, monkeypatch
):
    """A run that was copied to another machine could not be resumed, loaded or exported."""
    base, data = tmp_path / "here/base", tmp_path / "here/data"
    shutil.copytree(tiny_folder, base)
    shutil.copytree(sentiment, data)
    task = {"task": str(sentiment / "task.yaml")}
    before = settings(base, data, tmp_path / "run", data=task)
    stop_after(make_config(before), 5)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ModelError, match="check the path"):
        train(before, resume=True)
    base, data = tmp_path / "there/base", tmp_path / "there/data"
    now = make_config(settings(base, data, tmp_path / "run", data=task))
    train(now, resume=True)
    assert train(now, resume=True)["steps"] == 11  # nothing to resume
    train(configure("whole"))
    assert_same_links(tmp_path / "run", tmp_path / "whole")
    load_run(tmp_path / "run")

    base.rename(tmp_path / "base")
    with pytest.raises(ModelError, match="set CHAINLORA_MODELS to the folder that contains it now"):
        load_run(tmp_path / "run")
    monkeypatch.setenv("CHAINLORA_MODELS", str(tmp_path))
    load_run(tmp_path / "run")


def test_rows_that_changed_are_refused(tiny_folder, sentiment, tmp_path):
    data = Path(shutil.copytree(sentiment, tmp_path / "data"))
    config = make_config(settings(tiny_folder, data, tmp_path / "run"))
    stop_after(config, 5)
    for name, edit in (
        ("train.jsonl", lambda lines: lines[1:] + lines[:1]),
        ("train.jsonl", lambda lines: [*lines, lines[0]]),
        ("train.jsonl", lambda lines: lines[:-1]),
        ("validation.jsonl", lambda lines: lines[::-1]),
        ("task.yaml", lambda lines: [line.replace("it was", "it is") for line in lines]),
    ):
        before = (data / name).read_text()
        (data / name).write_text("".join(edit(before.splitlines(keepends=True))))
        with pytest.raises(RunError, match=r"resumes with the rows it began with, in their order"):
            train(config, resume=True)
        (data / name).write_text(before)
    assert train(config, resume=True)["steps"] == 11


def test_watchers_may_change_over_a_resume_and_science_may_not(tiny_folder, sentiment, run_copy):
    def find(**keys) -> str:
        tree = settings(tiny_folder, sentiment, run_copy, chain={"rslora": True}, train=keys)
        (stage,) = make_plan([Stage("main", make_config(tree))]).stages
        return stage.state

    assert find(save_every=7, trackers=["tensorboard"]) == "finished"
    for keys in ({"seed": 1}, {"lr": 1e-4}, {"dtype": "bfloat16"}):
        with pytest.raises(
            RunError, match=r"began with \(got stage 'main': train\.\w+ is .*, was "
        ):
            find(**keys)
    with pytest.raises(RunError, match=r"train.lr is 0.0001, was 0.01 in .*choose another output"):
        find(lr=1e-4)


def test_a_resume_under_other_versions_says_so(rich_config, tmp_path, caplog):
    stop_after(rich_config, 6)
    draft = read_draft(tmp_path / "run" / "stages" / "main")
    draft.training.versions["torch"] = "2.1"
    write_part(stage_dir(tmp_path / "run") / "stage.json", draft)
    train(rich_config, resume=True)
    assert "the run was begun with torch 2.1, now 2." in caplog.text
    assert "transformers" not in caplog.text


# --- faults on the way


def test_a_damaged_checkpoint_falls_back_to_the_knot(rich_config, tmp_path, caplog):
    train(rich_config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(rich_config, 6)
    (stage_dir(tmp_path / "run") / "checkpoints/00000006/link.safetensors").write_bytes(b"half")
    train(rich_config, resume=True)
    assert "the checkpoint at step 6 cannot be used" in caplog.text
    assert "the run resumes from step 4" in caplog.text
    assert_same_links(tmp_path / "run", tmp_path / "whole")
    assert_same_records(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_lock_is_refused(
    number, configure, stored_run, tmp_path, chainlora, monkeypatch
):
    """Without a lock two processes could write one run. What only reads a run needs none."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    run = shutil.copytree(stored_run, tmp_path / "copy")
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    said = r"be locked \(got .*; choose a folder on a disk with file l"
    with pytest.raises(FileError, match=said):
        train(configure(chain={"ranks": [2], "steps": [1]}))
    chainlora("undo", run).refused("a file must be locked", f"for {run}/.lock")
    assert chainlora("log", run).status == chainlora("inspect", run).status == 0
