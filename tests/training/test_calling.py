"""`train` as scripts and notebooks call it: what it takes, what it shows, what it returns."""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import warnings
from contextlib import nullcontext
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import settings, stop_after

from chainlora import TrainResult, make_config, train
from chainlora.errors import ConfigError
from chainlora.training.events import Evaluated, Planned, Scored, StepDone
from chainlora.training.progress import progress_listener


@pytest.fixture
def tree(tiny_folder, sentiment) -> dict:
    return settings(tiny_folder, sentiment, chain={"ranks": [2], "steps": [20]})


def test_train_takes_a_config_a_mapping_and_a_path(tree, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    results = [train(each) for each in (make_config(tree), tree, path, str(path))]
    digests = {json.dumps([r["metrics"], r["tokens"], r["rows_digest"]]) for r in results}
    assert len(digests) == 1
    for result in results:
        assert result.keys() == get_type_hints(TrainResult).keys()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("32 training rows, 20 steps\n") == 4
    assert shown.err.count("step    20  loss ") == 4
    with pytest.raises(ConfigError, match=r"unknown key `lora_r`; here it is `chain.ranks`"):
        train(tree | {"lora_r": 8})


def test_progress_is_shown_unless_somebody_listens(tree, capsys):
    seen = []
    train(tree, listener=seen.append)
    assert "training rows" not in capsys.readouterr().err  # transformers shows a bar of its own
    train(tree, listener=seen.append, progress=True)
    assert "step    20  loss " in capsys.readouterr().err
    assert [event.name for event in seen].count("plan") == 2
    train(tree, progress=False)
    assert "training rows" not in capsys.readouterr().err


@pytest.mark.parametrize("ends", [True, False])
def test_a_script_is_after_train_what_it_was(tree, ends):
    """Also one that switched gradients off, and where its listener fails."""

    def state() -> list:
        found = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].sum()]
        found += [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()]
        found += [
            torch.is_inference_mode_enabled(),
            signal.getsignal(signal.SIGINT),
            warnings.filters,
        ]
        return [*found, dict(os.environ), dict(AcceleratorState._shared_state)]

    def listener(event):
        if not ends and isinstance(event, StepDone):
            raise KeyboardInterrupt

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(5)
    with torch.inference_mode():
        before = state()
        with nullcontext() if ends else pytest.raises(KeyboardInterrupt):
            train(tree, listener=listener)
        assert state() == before
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    train(tree, progress=False)  # in a process that has one
    assert AcceleratorState().mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_random_state_is_kept_by_a_resume_behind_the_first_link(tree, tmp_path):
    tree["train"]["save_every"], tree["output"] = 1, str(tmp_path / "run")
    tree["chain"] |= {"ranks": [2, 2], "steps": [3, 2]}
    stop_after(make_config(tree), 4)
    before = torch.get_rng_state()
    train(tree, resume=True, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


# --- a log file ---


def lines_of_steps(err: str) -> list[int]:
    words = [line.split() for line in err.splitlines() if "  loss " in line]
    return [int(line[1]) for line in words]


def test_a_log_has_a_line_every_so_many_steps(tree, capsys):
    train(tree | {"train": tree["train"] | {"log_every": 6}})
    err = capsys.readouterr().err
    assert lines_of_steps(err) == [6, 12, 18]
    assert " tokens/s, 0:0" in err
    train(tree)
    assert lines_of_steps(capsys.readouterr().err) == [*range(2, 21, 2)]  # a tenth of the run


def say(steps: int, total: int) -> None:
    """Show a run that has made some steps of a second each."""
    with progress_listener() as listener:
        listener(Planned(0, total, [total], 8, "packed", 1, [], {}))
        for step in range(1, steps + 1):
            listener(StepDone(step, 0, 1.0, 1e-3, 1.0, 10, 1.0))


def test_the_time_left_can_be_believed(capsys):
    """The demo's first one was 2:38:45, told by its first step."""
    with progress_listener() as listener:
        listener(Planned(0, 100, [100], 8, "packed", 1, [], {}, log_every=1))
        for step in range(1, 11):
            seconds = 90.0 if step == 1 else 0.5
            listener(StepDone(step, 0, 1.0, 1e-3, 1.0, 10, seconds))
    told = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert not any("left" in line for line in told[:4])
    assert [line.rsplit(", ", 1)[1] for line in told[4:]] == [
        f"0:{round((100 - step) / 2):02} left" for step in range(5, 11)
    ]


def test_the_time_left_counts_evaluations(capsys, monkeypatch):
    """Without them it was a fifth of the truth where every third step is followed by one."""
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    with progress_listener() as listener:
        listener(Planned(0, 30, [30], 8, "packed", 1, [], {}, [10, 20, 30, 30], log_every=1))
        clock += 60
        listener(Evaluated(0, 0, "start", {"loss": 1.0}))
        for step in range(1, 11):
            clock += 1
            listener(StepDone(step, 0, 1.0, 1e-3, 1.0, 10, 1.0))
    told = [line for line in capsys.readouterr().err.splitlines() if "loss 1.0000 (" in line]
    assert [line.rsplit(", ", 1)[1] for line in (told[4], told[9])] == ["4:25 left", "4:20 left"]


@pytest.mark.parametrize("at_knots", [True, False])
def test_the_plan_says_when_rows_will_be_scored(tree, at_knots):
    seen = []
    keys = {"eval_every": 2, "eval_at_knots": at_knots}
    chain = tree["chain"] | {"ranks": [2, 2], "steps": [4, 3]}
    data = tree["data"] | {"test": tree["data"]["validation"]}
    config = tree | {"chain": chain, "data": data, "train": tree["train"] | keys}
    train(config, listener=seen.append)
    (plan,) = (event for event in seen if isinstance(event, Planned))
    told = [e.step for e in seen if isinstance(e, Evaluated) and e.where != "start"]
    told += [e.step for e in seen if isinstance(e, Scored)][at_knots:]
    assert plan.evaluations == told


def test_a_notebook_gets_lines_and_needs_no_widgets(monkeypatch, capsys):
    class ZMQInteractiveShell:
        """What rich and others take for a notebook."""

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel does
    say(2, total=2)
    shown = capsys.readouterr()
    assert lines_of_steps(shown.err) == [1, 2]
    assert shown.out == ""
