"""The board's training: it is stopped, continued and combined, and what fails is said."""

from __future__ import annotations

import signal
import time

import pytest
from conftest import make_tiny_folder, write_rows
from helpers import Stop, train_on

from chainlora import extend, train
from chainlora.errors import RunError
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import redo, undo
from chainlora.training.events import LayerSolved
from chainlora_pages.board.desk import Desk
from chainlora_pages.board.training import Trainer, command_of
from chainlora_pages.board.watching import standing_of


def test_a_training_is_stopped_and_resumed_and_what_fails_is_said(tmp_path):
    rows = [{"prompt": f"the cat sat on {n}", "completion": " blue lakes"} for n in range(64)]
    file = write_rows(tmp_path / "lakes.jsonl", rows)
    roomy = make_tiny_folder(tmp_path / "roomy", max_position_embeddings=256)  # for general rows
    settings = {"chain.epochs": 20, "train.lr": 0.3}  # much is forgotten
    command = command_of(tmp_path, file, model=str(roomy), settings=settings)
    trainer, other = Trainer(), Trainer()
    trainer.start(command)
    trainer.start(command)  # a second click
    with pytest.raises(RunError, match="only one can run at a time"):
        trainer.start([*command, "--train.seed=1"])
    while trainer.is_training and not any("step" in line for line in trainer.lines()):
        time.sleep(0.05)
    trainer.stop()
    assert trainer.wait() == 128 + signal.SIGTERM
    assert trainer.standing == "Stopped and saved. Press Continue to resume."
    assert standing_of(tmp_path / "lakes")["state"] == "interrupted"
    assert command_of(tmp_path, None, run=tmp_path / "lakes") == trainer.offer.words
    other.start(trainer.offer.words)
    assert other.wait() == 0
    assert any("resuming after step" in line for line in other.lines(100))
    assert other.standing.startswith("Trained.")
    assert "general ability has fallen; chainlora combine" in other.harm
    desk = Desk(tmp_path / "lakes")  # its entry `start` holds general rows alone
    assert [*desk.entries.values()] == [desk.now.key, desk.before] == ["lakes", "base"]
    undo(desk.run)
    desk = Desk(desk.run)
    assert [*desk.entries.values()] == [desk.before, desk.now.key] == ["lakes", "base"]
    redo(desk.run)
    other.start(other.offer.words)
    assert other.wait() == 0
    assert other.standing.startswith("Combined.")
    assert open_run(tmp_path / "lakes").entry.kind == "combine"
    bad = write_rows(tmp_path / "bad.jsonl", [*rows, {"promt": "a"}])
    other.start(command_of(tmp_path, bad, model=str(roomy)), bad.name)
    assert other.wait() == 1
    assert other.standing.startswith("Not done. Line 65 of bad.jsonl cannot be read: ")
    trainer.start(command_of(tmp_path, file, model=str(roomy), name="early"))
    trainer.stop()  # before anything was written
    trainer.wait()
    assert trainer.standing.startswith("Stopped. Nothing is left to resume")
    assert trainer.offer is None
    trainer.start(command_of(tmp_path, file, model="no/model", name="other"))
    assert trainer.wait() == 1
    assert trainer.standing.startswith("Not done. `model` must be")
    assert str(tmp_path) not in trainer.standing
    assert trainer.lines()[-1].startswith("error: ")


def test_a_run_whose_combination_was_stopped_is_not_done(tmp_path):
    """It was called done, and Continue was not offered."""
    for name in ("lakes", "hills"):
        rows = [{"prompt": f"the cat sat on {n}", "completion": f" blue {name}"} for n in range(8)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    run, keys = tmp_path / "run", {"chain": {"ranks": [1], "steps": [1]}}
    model = make_tiny_folder(tmp_path / "model")
    lakes, hills = ({"train": str(tmp_path / f"{name}.jsonl")} for name in ("lakes", "hills"))
    first = {"model": str(model), "output": str(run), "data": lakes}
    train(first | keys | {"start_data": "none"}, progress=False)
    assert standing_of(run)["state"] == "done"

    def stop(event):
        if isinstance(event, LayerSolved):
            raise Stop

    second = {"name": "hills", "data": hills}
    with pytest.raises(Stop):
        train_on(run, second | keys, beside=True, listener=stop)
    assert standing_of(run)["state"] == "interrupted"
    extend(run, second | keys, progress=False)
    assert standing_of(run)["state"] == "done"
