"""Two commands on one run: the second one is told which command writes it; readers need no lock."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.lives import start, wait
from helpers import train_on
from helpers_stages import files_of, section

from chainlora.runs.addresses import open_run
from chainlora.runs.changes import work_left
from chainlora.runs.history_file import read_history
from chainlora.training.stages import combine, prune

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")


def _extend(run: Path, sentiment: Path, pause: Callable[..., None]) -> None:
    own = section(sentiment, "d")
    train_on(run, own, beside=True, listener=lambda event: event.name == "step" and pause())


def _combine(run: Path, sentiment: Path, pause: Callable[..., None]) -> None:
    combine(run, ["a", "c"], progress=pause)


def _prune(run: Path, sentiment: Path, pause: Callable[..., None]) -> None:
    prune(run, "b", listener=lambda event: pause())


FIRST = {"extend": _extend, "combine": _combine, "prune": _prune}


@pytest.mark.parametrize("command", FIRST)
def test_a_second_command_is_told_who_writes_the_run(command, abc, sentiment, tmp_path, chainlora):
    """And changes nothing; a killed holder leaves no lock, and the same command ends its work."""
    flag, rows = tmp_path / "flag", section(sentiment, "d")["data"]["train"]
    pushed = tmp_path / "pushed"
    assert chainlora("push", abc, pushed, "--rows").status == 0

    def pause(*_: Any) -> None:
        flag.touch()
        time.sleep(600)

    def hold() -> None:
        sys.argv = ["chainlora", command]
        FIRST[command](abc, sentiment, pause)

    holder = start(hold)
    try:
        _refuse_all(holder[0], command, abc, rows, flag, chainlora)
        readers = [f"log {abc}", f"inspect {abc}@a"]
        if command != "prune":  # what it deletes is not sent
            readers.append(f"push {abc} {tmp_path / 'two'}")
        for reader in readers:
            assert chainlora(reader).status == 0, reader
    finally:
        os.kill(holder[0], signal.SIGKILL)
        assert wait(holder).status == -signal.SIGKILL
    FIRST[command](abc, sentiment, lambda *_: None)
    wanted = {"extend": ["a", "b", "c", "d"], "combine": ["a", "c"], "prune": ["a", "c"]}
    assert open_run(abc).verify().stages == wanted[command]
    assert not work_left(read_history(abc))


def _refuse_all(
    holder: int, command: str, run: Path, rows: str, flag: Path, chainlora: Any
) -> None:
    while not flag.exists():
        assert not os.waitid(os.P_PID, holder, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        time.sleep(0.01)
    before = files_of(run)
    seconds = [f"train {run}", f"extend {run} {rows} --name d", f"combine {run} a b", f"undo {run}"]
    seconds += [f"redo {run}", f"prune {run} a --yes", f"add {run} none --rows {rows}"]
    for second in seconds:
        said = f"Cannot write {run}: chainlora {command} (process {holder}) has been writing it"
        chainlora(second).refused(said, "Wait for it, or stop it.")
    assert files_of(run) == before
