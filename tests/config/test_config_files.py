"""What a config file can do wrong, as YAML or with keys of other tools, is an error of ours."""

from __future__ import annotations

import pytest
import yaml

from chainlora import LinkConfig, load_config, make_config
from chainlora.cli.main import run as command
from chainlora.config.messages import foreign_keys
from chainlora.config.reading import dump_config
from chainlora.config.yaml_text import dump_yaml, parse_yaml
from chainlora.errors import ConfigError
from chainlora.training.optimizers import check_name
from config.test_command_line_keys import KEYS

WRONG = {
    "a circle": "a: &a {b: *a}",
    "a long file": "a: " + "x" * 2**20,
    "deep lists": "a: " + "[" * 10_000,
    "no date": "a: 2020-13-45",
    "no bool": "a: !!bool foo",
    "an object": "a: !!python/object:os.system x",
    "a call": "a: !!python/object/apply:os.system [ls]",
    "an octal number": "a: 010",
    "half a surrogate": 'a: "\\ud800" b',
    "control characters": "a: \x07",
    "a list for a key": "? [a, b]\n: c",
    "twice": "a: 1\na: 2",
    "no end": "a: 'x",
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


# --- keys of other tools ---


# Beginnings of configs as the tools' own examples have them.
FILES = {
    "Axolotl": "base_model: m\ndatasets:\n  - {path: rows.jsonl, type: alpaca}\nlora_r: 32\n",
    "LLaMA-Factory": "model_name_or_path: m\nlora_rank: 8\nlora_target: all\ncutoff_len: 1024\n",
    "torchtune": "model: {lora_rank: 64, lora_alpha: 128}\ndataset: {packed: false}\nepochs: 1\n"
    "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}\n",
    "litgpt": "checkpoint_dir: m\nlora_r: 32\nlora_key: true\nprecision: bf16-true\n",
    "TRL": "model_name_or_path: m\ndataset_name: d\nuse_peft: true\nmax_steps: 100\n",
    "PEFT": "base_model_name_or_path: m\nr: 16\nlora_alpha: 64\ntarget_modules: q_proj\n",
}


@pytest.mark.parametrize("tool", FILES)
def test_a_whole_foreign_file_is_told_from_a_wrong_key(chainlora, tmp_path, tool):
    file = tmp_path / "theirs.yaml"
    file.write_text(FILES[tool])
    chainlora("train", file).refused(
        f"config file must have chainlora's keys (got {file} with ",
        "write a config with chainlora's keys",
    )


@pytest.mark.parametrize(
    ("part", "key", "said"),
    [
        ("top", {"lora_r": 8}, "lora_r`; here it is `chain.ranks`"),
        ("chain", {"tune": "full"}, "chain.tune`; there is no .* here: .* transformers' Trainer$"),
        ("chain", {"dora": True}, "chain.dora`; .*no longer trained"),
        ("link", {"dora": True}, "dora`; .*no longer trained"),
        ("link", {"train_factors": "B"}, "train_factors`; .*optimizer: rac_lora"),
        ("link", {"extra_modules": ["norm"]}, "extra_modules`; .*no longer fully trained"),
    ],
)
def test_a_key_of_another_tool_or_of_a_released_version_says_what_does_its_work(part, key, said):
    tree = {"model": "m", "data": {"train": "x"}, "chain": {"steps": [1], "ranks": [8]}}
    tree |= {"chain": tree["chain"] | key} if part == "chain" else key
    with pytest.raises(ConfigError, match=f"^unknown key `{said}"):
        LinkConfig(**key) if part == "link" else make_config(tree)


def test_our_side_of_the_table_exists():
    for key, entry in foreign_keys().items():
        assert entry.tools
        assert entry.ours or entry.say, key
        assert entry.ours is None or entry.ours.partition(".fields")[0] in KEYS, key
    for key in ("optim", "optimizer"):
        for name in foreign_keys()[key].values.values():
            assert name.endswith("bit") or check_name(name) is None
