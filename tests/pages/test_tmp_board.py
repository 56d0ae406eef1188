"""The board's training: it is stopped, continued and combined, and what fails is said."""

from __future__ import annotations

import signal
import time

import pytest
from conftest import make_tiny_folder, write_rows

from chainlora.errors import RunError
from chainlora.runs.addresses import open_run
from chainlora_pages.board.training import Trainer, command_of
from chainlora_pages.board.watching import standing_of


def _t(x):
    a=time.monotonic(); r=x.wait(); print('WAIT', round(time.monotonic()-a,1), x.lines(3)); return r

def test_a_training_is_stopped_and_resumed_and_what_fails_is_said(tmp_path):
    rows = [{"prompt": f"the cat sat on {n}", "completion": " blue lakes"} for n in range(64)]
    file = write_rows(tmp_path / "lakes.jsonl", rows)
    roomy = make_tiny_folder(tmp_path / "roomy", max_position_embeddings=256)  # for general rows
    settings = {"chain.epochs": 20, "train.lr": 0.3}  # much is forgotten
    command = command_of(tmp_path, file, model=str(roomy), settings=settings)
    trainer, other = Trainer(), Trainer()
    trainer.start(command)
    with pytest.raises(RunError, match="only one training can run"):
        trainer.start(command)
    while trainer.is_training and not any("step" in line for line in trainer.lines()):
        time.sleep(0.05)
    trainer.stop()
    assert _t(trainer) == 128 + signal.SIGTERM
    assert trainer.standing == "Stopped and saved. Press Continue to resume."
    assert standing_of(tmp_path / "lakes")["state"] == "interrupted"
    assert command_of(tmp_path, None, run=tmp_path / "lakes") == trainer.offer.words
    other.start(trainer.offer.words)
    assert _t(other) == 0
    assert any("resuming after step" in line for line in other.lines(100))
    assert other.standing.startswith("Trained.")
    assert "general ability has fallen; chainlora combine" in other.harm
    other.start(other.offer.words)
    assert _t(other) == 0
    assert other.standing.startswith("Combined.")
    assert open_run(tmp_path / "lakes").entry.kind == "combine"
    bad = write_rows(tmp_path / "bad.jsonl", [*rows, {"promt": "a"}])
    other.start(command_of(tmp_path, bad, model=str(roomy)), bad.name)
    assert _t(other) == 1
    assert other.standing.startswith("Not trained. Line 65 of bad.jsonl cannot be read: ")
    trainer.start(command_of(tmp_path, file, model=str(roomy), name="early"))
    trainer.stop()  # before anything was written
    _t(trainer)
    assert trainer.standing.startswith("Stopped. Nothing is left to resume")
    assert trainer.offer is None
    trainer.start(command_of(tmp_path, file, model="no/model", name="other"))
    assert _t(trainer) == 1
    assert trainer.standing == "Not trained:"
    assert trainer.lines()[-1].startswith("error: ")
