"""How many trained rows a run answers exactly."""

from __future__ import annotations

from helpers import settings

from chainlora import diff, train
from chainlora.cli.main import run as cli
from chainlora.evaluation.right_answers import compared, right_answers


def test_trained_rows_that_are_answered_exactly_are_counted(
    tiny_folder, sentiment, tmp_path, capsys
):
    """They are the rows that `diff` counts; the summary of a command tells them."""
    rows = {"validation": None, "num_train": 12}
    tree = settings(tiny_folder, sentiment, tmp_path / "run", data=rows)
    train(tree | {"chain": tree["chain"] | {"steps": [20, 20, 10]}})
    base, run = (f"{tmp_path / 'run'}{at}" for at in ("@base", ""))
    told = diff(base, run, prompts=20)["answers"]["main"]
    assert right_answers(run) == {"main": (12, told["right_b"])}
    assert told["right_a"] < told["right_b"]
    assert right_answers(run, stages=()) == {}
    (row,) = compared(base, run)
    assert row.now == (12, told["right_b"])
    keys = [f"--data.task={sentiment / 'task.yaml'}", "--chain.ranks=[2]", "--chain.steps=[1]"]
    assert cli(["extend", run, str(sentiment / "train.jsonl"), "--name", "more", *keys]) == 0
    assert "of 20 trained rows are answered exactly" in capsys.readouterr().out
