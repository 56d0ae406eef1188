"""Stages by the command line."""

from __future__ import annotations

import json

from chainlora.cli.main import run as cli
from chainlora.runs.addresses import open_run


def test_the_command_line_goes_from_two_data_sets_to_one_adapter(staged, tmp_path, chainlora):
    def said(*words: object) -> str:
        done = chainlora(*words)
        assert done.status == 0, done.err
        return done.out

    stages, run = staged.pop("stages"), tmp_path / "run"
    file, style = tmp_path / "mine.yaml", tmp_path / "style.yaml"
    file.write_text(json.dumps(staged | {"stages": stages[:1]}))
    style.write_text(json.dumps(stages[1]))
    assert "facts: would train links of rank 4, 4, 2" in said("train", file, "--dry-run")
    rows = [str(stages[0]["data"]["train"]), str(tmp_path / "more.jsonl")]
    several = json.dumps([rows[0], {"path": rows[1], "weight": 2}])
    planned = said("train", file, "--dry-run", "--stages.facts.data.train", several)
    assert planned.endswith(f" rank 4, 4, 2 on {', '.join(rows)}\n")
    assert not run.exists()
    for is_done in (False, True):
        for words in (f"train {file}", f"extend {run} {style} --on-top"):
            assert ("nothing left to do" in said(words)) == is_done
    assert "from 5 link(s)" in said(f"export {run} --to adapter --output {tmp_path / 'out'}")
    assert "validation `accuracy`" in (tmp_path / "out/README.md").read_text()
    for address in (f"{run}@facts", f"{run}@style", str(run)):
        planned = ["3 × 2 steps", *(["2 steps, 3 steps"] if "@facts" not in address else [])]
        lines = [line for line in said(f"inspect {address}").splitlines() if "planned" in line]
        assert [line.partition(": ")[2] for line in lines] == planned
        said(f"eval {address}")
    assert chainlora(f"train {file} --stages.facts.train.lr 1").status == 1


def test_a_rank_that_no_launcher_has_set_is_none(staged, tmp_path, capsys, monkeypatch):
    """Some shells have a RANK; only beside WORLD_SIZE it says that another process shows things."""
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "mine.yaml").write_text(json.dumps(staged))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ["facts", "style"]
    assert open_run(tmp_path / "run").stages == ["facts", "style"]
