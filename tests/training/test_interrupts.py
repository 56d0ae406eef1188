"""Signals: once, the step or batch is finished and saved; twice, or with nothing to save, stop at
once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import assert_same_links, assert_same_records

from chainlora import train
from chainlora.cli.main import run as command
from chainlora.errors import StoppedError
from chainlora.runs.addresses import open_run
from chainlora.runs.work import Work
from chainlora.training.interrupts import interruptible, stop_requested
from chainlora.training.objectives import OBJECTIVES, LanguageModelling

EVERY = {"save_every": None}  # a stop saves although nothing else does


def listening(interrupts, act, at_step: int):
    interrupts.defer()

    def listener(event) -> None:
        if event.name == "step" and event.step == at_step:
            act()

    return listener


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_finishes_the_step_and_saves(configure, tmp_path):
    """Inside a link, at a knot, and at the last step."""
    train(configure("whole", train=EVERY))
    for number, step in ((signal.SIGINT, 2), (signal.SIGTERM, 4), (signal.SIGINT, 11)):
        config, told = configure(f"{step}", train=EVERY), list[int]()
        with interruptible(told.append) as interrupts:
            listener = listening(interrupts, partial(kill, number), step)
            said = rf"step {step} of 11 .*repeat the command to resume"
            with pytest.raises(StoppedError, match=said) as raised:
                train(config, listener=listener)
            assert raised.value.signal == number
            assert open_run(tmp_path / f"{step}").draft.position.step == step
        assert told == [number]
        assert stop_requested() is None
        train(config, resume=True)
        assert_same_links(tmp_path / f"{step}", tmp_path / "whole")


class Halted(LanguageModelling):
    """Scores a few rows at a time; in one evaluation, a signal comes after the first of them."""

    def __init__(self, at: int | None) -> None:
        super().__init__("candidates")
        self.at, self.made = at, 0

    def evaluate(self, engine, examples, **options):
        self.made += 1
        is_here = self.made == self.at

        def tell(done: int, rows: int) -> None:
            assert done < rows or not is_here, "the evaluation went on to its end"
            if is_here:
                kill(signal.SIGTERM)
            options["progress"](done, rows)

        return super().evaluate(engine, examples, **options | {"max_tokens": 64, "progress": tell})


@pytest.mark.parametrize(
    ("evaluation", "step", "keys"),
    [
        (1, 0, {}),  # before training
        (2, 2, {"keep_best": True, "early_stop": 1}),
        (3, 3, {"optimizer": "relora"}),  # at a knot
        (5, 5, {"keep_best": True}),  # at the last one
    ],
)
def test_a_signal_during_an_evaluation_stops_after_its_batch(
    evaluation, step, keys, configure, tmp_path, monkeypatch
):
    """The resume makes the evaluation, and the run is the one that was never stopped."""
    sections = {"chain": {"ranks": [4, 4], "steps": [3, 2]}}
    sections |= {"train": EVERY | {"eval_every": 2} | keys}
    config, whole = configure(**sections), configure("whole", **sections)
    monkeypatch.setitem(OBJECTIVES, "candidates", Halted(None))
    expected = train(whole)
    monkeypatch.setitem(OBJECTIVES, "candidates", Halted(evaluation))
    with interruptible() as interrupts, pytest.raises(StoppedError, match=f"after step {step} of"):
        train(config, listener=listening(interrupts, lambda: None, step))
    assert open_run(tmp_path / "run").verify().draft.position.step == step
    assert train(config, resume=True)["metrics"] == expected["metrics"]
    assert_same_links(tmp_path / "run", tmp_path / "whole")
    assert_same_records(tmp_path / "run", tmp_path / "whole")


def test_the_second_signal_stops_at_once(configure, tmp_path):
    config = configure(train=EVERY)

    def twice() -> None:
        kill(signal.SIGINT)
        kill(signal.SIGTERM)

    with interruptible() as interrupts, pytest.raises(KeyboardInterrupt):
        train(config, listener=listening(interrupts, twice, 6))
    assert open_run(tmp_path / "run").draft.position.step == 4
    assert train(config, resume=True)["steps"] == 11


def test_without_a_run_directory_a_stop_says_what_is_lost(configure):
    with interruptible() as interrupts:
        listener = listening(interrupts, lambda: kill(signal.SIGINT), 2)
        with pytest.raises(StoppedError, match="it cannot be resumed"):
            train(configure(None), listener=listener)


def test_the_command_line_stops_with_the_status_that_shells_expect(
    config, tmp_path, capfd, monkeypatch
):
    record = Work.record

    def killing(self, values, progress) -> None:
        record(self, values, progress)
        if values["event"] == "step" and values["step"] == 5:
            kill(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "record", killing)
        assert command(["train", str(config)]) == 128 + signal.SIGTERM
    err = capfd.readouterr().err
    assert "stopping after this step; press Ctrl-C again to stop at once" in err
    assert "chainlora: the run stopped after step 5 of 11" in err
    assert "Traceback" not in err
    assert command(["inspect", str(tmp_path / "run")]) == 0
    assert "unfinished: 1 of 3 link(s) tied; `chainlora train CONFIG` resumes from step 5" in (
        capfd.readouterr().out.replace("\n", "")
    )
    assert command(["train", str(config)]) == 0
    assert "resuming after step 5" in capfd.readouterr().err
    assert command(["inspect", str(tmp_path / "run")]) == 0
    assert "unfinished" not in capfd.readouterr().out


def test_ctrl_c_while_modules_load_is_no_traceback(tmp_path):
    """The command line catches it from its first import on."""
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2] / 'src'}"}
    done = subprocess.run(
        [sys.executable, "-m", "chainlora", "--help"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 130
    assert done.stderr == "chainlora: interrupted\n"
