"""`chainlora inspect` and `export`: what they show and write of a run, whole or damaged. `log`,
`undo` and `redo`: how it became what it is, and what it was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import write_rows
from helpers import stop_after

from chainlora import load_config
from chainlora.runs.changes import log


def test_inspect_shows_every_link_and_draws_them(chainlora, finished):
    rows = chainlora(f"inspect {finished} --json").json["links"]
    assert [row["link"] for row in rows] == [0, 1, 2]
    keys = {"rank", "steps", "loss", "scores", "delta_norm", "effective_rank", "overlap"}
    assert keys <= set(rows[0])
    assert (finished / "chain.png").read_bytes().startswith(b"\x89PNG")
    shown = chainlora(f"inspect {finished}")
    assert (shown.status, shown.err) == (0, "")
    for column in ("link", "rank", "loss", "validation", "‖ΔW‖", "effective rank", "overlap with"):
        assert column in shown.out


def test_export_says_what_it_wrote(chainlora, finished, tmp_path):
    adapter = f"export {finished} --to adapter --output {tmp_path}"
    assert chainlora(f"{adapter}/exact --json").json == {
        "to": "adapter",
        "output": str(tmp_path / "exact"),
        "links": 3,
        "rank": 10,
        "error": 0.0,
        "exact": True,
        "base": "tiny-llama",
    }
    small = chainlora(f"{adapter}/small --rank 2")
    assert small.out.startswith("adapter of rank 2 (relative error ")
    assert small.err == ""
    assert chainlora(f"{adapter}/near --tolerance .2 --json").json["error"] <= 0.2
    one = chainlora(f"export {finished} --to merged --output {tmp_path}/m --links 1 --json").json
    assert (one["to"], one["links"], one["dtype"]) == ("merged", 1, "float32")
    files = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert files <= {path.name for path in (tmp_path / "m").iterdir()}


# --- history ---


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory) -> Path:
    """A run of two stages, main and birds."""
    from chainlora.cli.main import run as command

    folder = tmp_path_factory.mktemp("extended")
    run = shutil.copytree(finished, folder / "run")
    told = [{"prompt": f"the cat sat on {n}", "completion": " red birds fly"} for n in range(32)]
    rows = write_rows(folder / "rows.jsonl", told)
    keys = f"--data.train {rows} --chain.ranks 4 --chain.steps 1"
    assert command(["extend", str(run), "--on-top", "--name", "birds", *keys.split()]) == 0
    return run


@pytest.fixture
def run(extended, tmp_path) -> Path:
    return Path(shutil.copytree(extended, tmp_path / "run"))


def test_log_shows_every_state_and_which_one_the_run_is(chainlora, run):
    entries = chainlora(f"log {run} --json").json["entries"]
    keys = ("name", "kind", "parents", "stages", "links", "now", "before")
    assert [tuple(entry[key] for key in keys) for entry in entries] == [
        ("birds", "stage", ["main"], ["main", "birds"], 4, True, False),
        ("main", "stage", [], ["main"], 3, False, True),
    ]
    head, *lines = [line.split() for line in chainlora(f"log {run}").out.splitlines()]
    assert head == ["name", "kind", "on", "links", "stages", "ended", "state"]
    shown = [
        ["*", "birds", "stage", "main", "4", "main", "birds"],
        ["|", "main", "stage", "base", "3", "main"],
    ]
    for line, words, entry in zip(lines, shown, entries, strict=True):
        when = entry["ended"][:16].split("T")
        assert line == [*words, *when, entry["state"]]


@pytest.mark.parametrize("terminal", [{}, {"FORCE_COLOR": "1", "COLUMNS": "80"}])
def test_log_cuts_nothing(chainlora, run, terminal, monkeypatch):
    many = {"name": "rehearsal-10", "parents": [f"stage-{n}" for n in range(20)]}
    birds, main = log(run)
    monkeypatch.setattr("chainlora.runs.changes.log", lambda run: [birds | many, main])
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    words = chainlora(f"log {run}").out.split()
    assert {"*", "|", "rehearsal-10", *many["parents"], birds["state"], main["state"]} <= {*words}


def test_an_entry_of_the_log_has_the_keys_of_the_page(run):
    page = Path(__file__).parents[2] / "docs/python.md"
    said = page.read_text(encoding="utf-8").partition("Keys: ")[2].partition(". ")[0]
    assert re.findall(r"`(\w+)`", said) == list(log(run)[0])


def test_log_names_a_stage_that_is_trained(chainlora, config, tmp_path):
    stop_after(load_config(config), 6)
    asked = f"log {tmp_path}/run"
    assert chainlora(asked).out.splitlines()[1].split() == ["main", "in", "training"]
    assert chainlora(f"{asked} --json").json["entries"] == [{"name": "main", "kind": "training"}]
