"""The JSON Schema of a config: what editors are told is what is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from jsonschema import Draft202012Validator

from chainlora import ChainLoRAError, make_config
from chainlora.cli.main import run
from chainlora.config.json_schema import config_page, config_schema
from chainlora.config.reading import parse_yaml
from chainlora.config.staging import make_stages

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [ROOT / f"examples/{name}.yaml" for name in ("dates", "chat")]
LEAST = {"model": "m", "data": {"train": "rows.jsonl"}, "chain": {"ranks": [8], "steps": [9]}}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = config_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_command_prints_the_schema(capsys):
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == config_schema()


def test_config_md_has_what_stands_at_the_keys(chainlora):
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page.endswith(config_page()), "run `make pages`"
    assert chainlora("schema", "--markdown").out == config_page()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(validator, file):
    validator.validate(parse_yaml(file.read_text(encoding="utf-8")))


ACCEPTED = (
    "chain: {ranks: 8, steps: 10}",
    "chain: {ranks: [8, 4], epochs: [1, 0.5], alpha: [16, 8], knots: auto}",
    "chain: {ranks: [8], steps: [9], target_modules: q_proj, knots: {every: 3, share: 0.1}}",
    "model: {name: m, quantize: nf4}\nchain: {ranks: 8, steps: 9, hold: carried}",
    "data: {train: [a.jsonl, {path: b.jsonl, weight: 2}], validation: 0.05}",
    "data: {train: {path: b.jsonl, weight: 2}, validation: 500}",
    "train: {speedups: off, trackers: tensorboard, max_grad_norm: null}",
)
REFUSED = (
    "chain: {rank: 8}",
    "chain: {ranks: [eight]}",
    "chain: {hold: hands}",
    "train: {lr: 0}",
    "train: {lr: true}",
    "data: {train: [{path: a, weight: 0}]}",
    "data: {train: a, validation: 0}",
    "data: {train: a, validation: true}",
    "train: {early_stop: 0}",
    "data: {}\nmodle: m",
    "model: {nmae: m}",
)


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_is_accepted_is_valid(validator, text):
    tree = LEAST | parse_yaml(text)
    make_config(tree)
    validator.validate(tree)


STAGES = """
name: first
data: {train: a.jsonl, validation: 0.05}
chain: {ranks: [8], steps: [9], knots: auto}
"""


def test_a_config_of_stages_is_valid(validator):
    stage = parse_yaml(STAGES)
    whole = {"model": "m", "output": "o", "train": {"lr": 1e-3}, "stages": [stage]}
    assert len(make_stages(whole)) == 1
    validator.validate(whole)
    for wrong in (
        whole | {"stages": []},
        whole | {"stages": [stage | {"ouptut": "o"}]},
        whole | {"stages": [stage | {"data": {"trian": "a.jsonl"}}]},
        whole | {"start": "runs/mine@facts"},
        {"model": "m", "output": "o"},
        {"stages": [stage]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused_is_not_valid(validator, text):
    tree = LEAST | parse_yaml(text)
    with pytest.raises(ChainLoRAError):
        make_config(tree)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tree)
