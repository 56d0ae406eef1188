"""Stages by the command line."""

from __future__ import annotations

import io
import json
from itertools import product

import pytest

from chainlora.cli.main import run as cli
from chainlora.files import checksums
from chainlora.runs.addresses import open_run

# Whole commands by their words; ADDRESS is the run, or a stage of it.
VERBS = {
    "eval": "eval ADDRESS --limit 2",
    "generate": "generate ADDRESS --prompt good --max-new-tokens 2",
    "chat": "chat ADDRESS",
    "inspect": "inspect ADDRESS",
    "report": "report ADDRESS",
    "adapter": "export ADDRESS --to adapter --output OUT",
    "merged": "export ADDRESS --to merged --output OUT",
}


CHOICES = {
    "": 0,
    "--links 1": 0,
    "--stages facts=0.5": 0,
    "--stages nope": 1,
    "--stages facts --links 1": 2,
}


@pytest.mark.slow
def test_every_verb_takes_every_state_or_refuses_it_in_a_line(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    run = str(tmp_path / "run")
    for number, (verb, stage, choice) in enumerate(
        product(VERBS, ("", "@facts", "@nope"), CHOICES)
    ):
        if choice and verb != "eval" and (verb in ("inspect", "report") or stage):
            continue
        words = f"{VERBS[verb]} {choice}".replace("ADDRESS", run + stage)
        capsys.readouterr()
        status = cli(words.replace("OUT", str(tmp_path / f"out-{number}")).split())
        assert status == (CHOICES[choice] or int(stage == "@nope")), words
        said = capsys.readouterr().err
        assert status != 1 or "a stage must be one of facts" in said.splitlines()[-1]


def test_the_command_line_goes_from_two_data_sets_to_one_adapter(config, tmp_path, capsys):
    stages, run = config.pop("stages"), tmp_path / "run"
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(config | {"stages": stages[:1]}))
    (tmp_path / "style.yaml").write_text(json.dumps(stages[1]))
    assert cli(["train", str(file), "--dry-run"]) == 0
    assert "facts: would train links of rank 4, 4, 2" in capsys.readouterr().out
    rows = [str(stages[0]["data"]["train"]), str(tmp_path / "more.jsonl")]
    several = json.dumps([rows[0], {"path": rows[1], "weight": 2}])
    assert cli(["train", str(file), "--dry-run", "--stages.facts.data.train", several]) == 0
    assert capsys.readouterr().out.endswith(f" rank 4, 4, 2 on {', '.join(rows)}\n")
    assert not run.exists()
    assert cli(["train", str(file)]) == 0
    assert cli(["extend", str(run), str(tmp_path / "style.yaml"), "--on-top"]) == 0
    capsys.readouterr()
    for command in (
        ["extend", str(run), str(tmp_path / "style.yaml"), "--on-top"],
        ["train", str(file)],
    ):
        assert cli(command) == 0
        assert "nothing left to do" in capsys.readouterr().out
    assert cli(["mix", str(run), "style=0"]) == 0
    assert cli(["mix", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["strengths"]["style"] == 0
    assert cli(["export", str(run), "--to", "adapter", "--output", str(tmp_path / "a")]) == 0
    assert "from 3 link(s)" in capsys.readouterr().out
    only = ["--to", "adapter", "--stages", "facts"]
    assert cli(["export", str(run), *only, "--output", str(tmp_path / "b")]) == 0
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")  # the card too
    assert "Trained on" not in (tmp_path / "a/README.md").read_text()  # a stage that is off
    for name, stages, is_scored in (("c", "facts,style=0.5", False), ("d", "facts,style", True)):
        only = ["--to", "adapter", "--stages", stages, "--output", str(tmp_path / name)]
        assert cli(["export", str(run), *only]) == 0
        card = (tmp_path / name / "README.md").read_text()
        assert ("validation `accuracy`" in card) == is_scored  # scored was another mix
    assert cli(["mix", str(run), "style=1", "style=0"]) == 1
    assert "a stage must have one strength (got 'style' twice)" in capsys.readouterr().err
    assert cli(["eval", str(run), "--matrix", "--stages", "facts"]) == 2
    assert "--matrix scores the kept rows in all states; leave --stages out" in (
        capsys.readouterr().err
    )
    for address in (f"{run}@facts", f"{run}@style", str(run)):
        capsys.readouterr()
        assert cli(["inspect", address]) == 0
        planned = ["3 × 2 steps", *(["2 steps, 3 steps"] if "@facts" not in address else [])]
        lines = [line for line in capsys.readouterr().out.splitlines() if "planned" in line]
        assert [line.partition(": ")[2] for line in lines] == planned
        assert cli(["eval", address]) == 0
    assert cli(["train", str(file), "--stages.facts.train.lr", "1"]) == 1
    assert cli(["eval", f"{run}@nope"]) == 1


def test_a_rank_that_no_launcher_has_set_is_none(config, tmp_path, capsys, monkeypatch):
    """Some shells have a RANK; only beside WORLD_SIZE it says that another process shows things."""
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ["facts", "style"]
    assert open_run(tmp_path / "run").stages == ["facts", "style"]
