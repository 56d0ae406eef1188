"""`chainlora doctor`: what it says of a machine and of a model."""

from __future__ import annotations

import json

import pytest
from architectures.tiny import tiny_model

from chainlora.cli.main import run


def test_it_says_versions_and_devices(capsys):
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "machine"}
    assert found["versions"]["torch"][0].isdigit()
    assert found["machine"]["gpus"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("llama", ["packed sequences: yes", "fast decoder layers: yes"]),
        ("gpt2", ["packed sequences: yes", "fast decoder layers: no, "]),
        ("rwkv", ["packed sequences: no, "]),
    ],
)
def test_it_says_which_fast_paths_a_model_can_take(tmp_path, capsys, tiny_folder, kind, says):
    from transformers import AutoTokenizer

    tiny_model(kind, vocab_size=320).save_pretrained(tmp_path)  # as many as the tokenizer has
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    assert run(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in says:
        assert text in out
    assert "targets" in out


def test_a_model_that_cannot_be_tuned_is_refused_in_one_line(tmp_path, capsys):
    assert run(["doctor", str(tmp_path / "nothing")]) == 1
    assert "Traceback" not in capsys.readouterr().err
