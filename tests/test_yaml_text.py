"""What a YAML text can do wrong is an error of ours in one line, without a traceback."""

from __future__ import annotations

import pytest
import yaml

from chainlora import load_config, make_config
from chainlora.cli.main import run as command
from chainlora.config.reading import dump_config
from chainlora.config.yaml_text import dump_yaml, parse_yaml
from chainlora.errors import ConfigError

WRONG = {
    "a circle": "a: &a {b: *a}",
    "a long file": "a: " + "x" * 2**20,
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{a: " * 10_000,
    "no date": "a: 2020-13-45",
    "no hour": "a: 2020-01-01 99:99:99",
    "no hexadecimal": "a: 0x_",
    "no binary": "a: 0b_",
    "no bool": "a: !!bool foo",
    "no int": "a: !!int foo",
    "empty int": 'a: !!int ""',
    "no float": "a: !!float foo",
    "no timestamp": "a: !!timestamp foo",
    "no bytes": "a: !!binary é",
    "an object": "a: !!python/object:os.system x",
    "a call": "a: !!python/object/apply:os.system [ls]",
    "an octal number": "a: 010",
    "a time": "a: [1, 1:30]",
    "a long number": "a: " + "9" * 5000,
    "half a surrogate": 'a: "\\ud800" b',
    "control characters": "a: \x07",
    "a list for a key": "? [a, b]\n: c",
    "a mapping for a key": "? {a: b}\n: c",
    "twice": "a: 1\na: 2",
    "tabs": "a:\n\tb: 1",
    "no end": "a: 'x",
    "unknown alias": "a: *b",
    "two documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_yaml_can_do_wrong_is_one_line_at_once(name, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(WRONG[name], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"must be YAML \(got .*correct it there") as raised:
        load_config(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700
    assert command(["train", str(path)]) == 1
    assert "--debug" not in capsys.readouterr().err  # no unexpected error
    with pytest.raises(yaml.YAMLError):
        parse_yaml(WRONG[name])


@pytest.mark.parametrize("content", [b"a: \xff\xfe", b"\xff\xfea", b"\x00", b"a: \xc3\x28"])
def test_bytes_that_are_not_text(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"must be (UTF-8 text|YAML) \(got ") as raised:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 300, "no/such.yaml", "."])
def test_paths_that_are_not_paths(path):
    with pytest.raises(ConfigError, match=r"must be readable \(got ") as raised:
        load_config(path)
    str(raised.value).encode()


def test_aliases_that_people_write_still_work():
    text = "a: &all {lr: 1e-3, betas: [0.9, 0.99]}\nb:\n  <<: *all\n  lr: 2e-3\nc: *all"
    assert parse_yaml(text) == {
        "a": {"lr": 1e-3, "betas": [0.9, 0.99]},
        "b": {"lr": 2e-3, "betas": [0.9, 0.99]},
        "c": {"lr": 1e-3, "betas": [0.9, 0.99]},
    }


@pytest.mark.parametrize(
    "text", ["1e5", "1e-3", "true", "2020-01-01", "~", "0x1f", "010", "1:30", " a ", "ä: b"]
)
def test_a_text_that_reads_as_something_else_stays_a_text(text):
    """A folder named 1e5 was written to config.yaml as a number, and its run could not resume."""
    tree = {"model": text, "data": {"train": text}, "chain": {"ranks": [1], "steps": [1]}}
    config = make_config(tree)
    assert parse_yaml(dump_yaml({"a": text})) == {"a": text}
    assert make_config(parse_yaml(dump_config(config))) == config
