"""`chainlora doctor`: what it says of a machine and of a model."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from architectures.tiny import tiny_model
from transformers import AutoTokenizer

from chainlora import __version__

ROOT = Path(__file__).resolve().parents[1]


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


def test_a_model_that_cannot_be_tuned_is_refused_in_one_line(tmp_path, chainlora):
    outcome = chainlora(f"doctor {tmp_path}/nothing")
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
