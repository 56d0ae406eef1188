"""Stages by the command line."""

from __future__ import annotations

import json

from chainlora.cli.main import run as cli
from chainlora.runs.addresses import open_run


def test_a_rank_that_no_launcher_has_set_is_none(staged, tmp_path, capsys, monkeypatch):
    """Some shells have a RANK; only beside WORLD_SIZE it says that another process shows things."""
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "mine.yaml").write_text(json.dumps(staged))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ["facts", "style"]
    assert open_run(tmp_path / "run").stages == ["facts", "style"]
