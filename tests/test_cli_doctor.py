"""`chainlora doctor`: what it says of a machine and of a model."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from architectures.tiny import tiny_model

from chainlora import __version__
from chainlora.cli.main import run

ROOT = Path(__file__).resolve().parents[1]


def test_it_says_versions_and_devices(capsys):
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "extras", "machine"}
    assert found["versions"]["chainlora"] == __version__
    assert found["versions"]["torch"][0].isdigit()
    assert found["machine"]["gpus"]


def test_it_says_what_an_extra_is_for_where_it_is_missing(capsys):
    assert run(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["extras"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    told = {"docs", "test", "dev"}  # for those who work on chainlora itself
    for name in set(extras) - told:
        (package,) = (re.match(r"[\w-]+", requirement)[0] for requirement in extras[name])
        missing = f"pip install 'chainlora[{name}]'"
        assert said[package][0].isdigit() or missing in said[package]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("llama", ["packed sequences yes", "fast decoder layers yes"]),
        ("gpt2", ["packed sequences yes", "fast decoder layers no, "]),
        ("bloom", ["packed sequences no, "]),
    ],
)
def test_it_says_which_fast_paths_a_model_can_take(tmp_path, capsys, tiny_folder, kind, says):
    from transformers import AutoTokenizer

    tiny_model(kind, vocab_size=320).save_pretrained(tmp_path)  # as many as the tokenizer has
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    assert run(["doctor", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in [*says, "target_modules"]:
        assert text in out


def test_a_model_that_cannot_be_tuned_is_refused_in_one_line(tmp_path, capsys):
    assert run(["doctor", str(tmp_path / "nothing")]) == 1
    assert "Traceback" not in capsys.readouterr().err
