"""Whatever configs, overrides, manifests and adapters hold: an error of ours, or a right value.

``CHAINLORA_FULL=1`` runs more than 10,000 cases; without it a few hundred.
"""

from __future__ import annotations

import json
import os
import shutil
import string
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import as_format_1, settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from chainlora import inspect_run, load_config, make_config, train
from chainlora.chain.adapters import load_adapter
from chainlora.cli.main import run as command
from chainlora.config.loading import dump_config, set_key
from chainlora.config.schema import RunConfig
from chainlora.config.yaml_text import parse_yaml
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.runs.directory import RunDirectory
from chainlora.runs.manifest import _checksum

FULL = bool(os.environ.get("CHAINLORA_FULL"))


def fuzz(short: int, full: int):
    """Settings of one test: so many cases, on a busy machine without deadlines."""
    return hypothesis_settings(
        max_examples=full if FULL else short,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def check_error(error: ChainLoRAError) -> None:
    """One line that can be printed, and says what was wrong and what to do."""
    text = str(error)
    assert "\n" not in text, text
    assert any(word in text for word in ("(got ", "unknown key", "give ")), text
    text.encode("utf-8")


# --- values

WORDS = st.sampled_from(
    ["", "~", "null", "yes", "off", "1e5", "0x_", "2020-13-45", "!!bool foo", "*a", "&a", "<<", "[",
     "{", "- ", "? ", ": ", "'", '"', "|", ">", "%", "@", "`", "\n", "\t", "\x00", "\ud800", "é",
     "all-linear", "auto", "q_proj", "(a+)+$", "../x", "{{ x }}", "1:1:1", ".inf", "-.nan", "1_0"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 10**400]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), WORDS)
NAMES = st.one_of(st.text(max_size=5), WORDS, st.integers(0, 3))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=5), WORDS, st.integers(0, 3)), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


def keys(model: type[BaseModel]) -> list[str]:
    """Every dotted key of the config."""
    found = []
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        section = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        found += [name, *(f"{name}.{key}" for each in section for key in keys(each))]
    return found


KEYS = st.one_of(
    st.sampled_from(keys(RunConfig)),
    st.text(string.ascii_lowercase + "._", max_size=8),
    WORDS,
)
GOOD = {"model": "m", "data": {"train": "t"}, "chain": {"ranks": [2], "steps": [1]}}


def plant(tree: Any, path: str, value: Any) -> None:
    """Set a dotted key, whatever is in the way."""
    *parents, last = path.split(".")
    for part in parents:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


# --- configs


@fuzz(short=150, full=4000)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=4))
def test_a_config_of_any_values_is_refused_or_comes_back_the_same(pairs):
    tree = deepcopy(GOOD)
    for key, value in pairs:
        plant(tree, key, value)
    try:
        config = make_config(tree)
    except ConfigError as error:
        check_error(error)
        return
    assert make_config(parse_yaml(dump_config(config))) == config


@fuzz(short=100, full=2000)
@given(st.lists(st.tuples(KEYS, st.one_of(st.text(max_size=12), WORDS)), min_size=1, max_size=3))
def test_overrides_of_any_text_are_refused_or_make_a_config(pairs):
    tree = deepcopy(GOOD)
    try:
        for key, value in pairs:
            set_key(tree, key, value)
        config = make_config(tree)
    except ConfigError as error:
        check_error(error)
        return
    assert make_config(parse_yaml(dump_config(config))) == config


PIECES = st.one_of(
    WORDS,
    st.text(max_size=5),
    st.sampled_from(
        ["model: m\n", "chain:\n", "  ranks: [2]\n", "  steps: [1]\n", "&a [*a]", "- "]
    ),
)


@fuzz(short=100, full=3000)
@given(st.lists(PIECES, max_size=12), st.binary(max_size=6))
def test_a_file_of_any_text_is_refused_or_makes_a_config(tmp_path_factory, pieces, noise):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes("".join(pieces).encode("utf-8", "replace") + noise)
    try:
        load_config(path)
    except ConfigError as error:
        check_error(error)


@fuzz(short=30, full=500)
@given(st.lists(st.one_of(KEYS.map("--{}".format), WORDS, st.text(max_size=6)), max_size=4))
def test_arguments_of_any_text_end_with_a_status(tmp_path_factory, capsys, words):
    path = tmp_path_factory.getbasetemp() / "good.yaml"
    path.write_text("model: /no/such/model\ndata: {train: t}\nchain: {ranks: [2], steps: [1]}\n")
    for verb in (["train", str(path), "--output", "/no/such/run", "--resume"], ["inspect"]):
        status = command([*verb, *words])
        err = capsys.readouterr().err
        assert status in (0, 1, 2), err
        assert "--debug" not in err
        assert "Traceback" not in err


# --- what lies in a run directory


@pytest.fixture(scope="module")
def pristine(tiny_folder, sentiment, tmp_path_factory) -> dict[int, Path]:
    """A finished run with a best point inside a link, in both formats."""
    first = tmp_path_factory.mktemp("fuzz") / "run"
    keys = {"keep_best": True, "eval_every": 1, "select_metric": "accuracy"}
    train(make_config(settings(tiny_folder, sentiment, first, train=keys)))
    old = Path(shutil.copytree(first, first.with_name("old")))
    as_format_1(old)
    return {1: old, 2: first}


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON tree."""
    found = [path] if path else []
    if not isinstance(tree, dict | list):
        return found
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found += places(value, (*path, key))
    return found


def change(tree: Any, path: tuple, value: Any, *, delete: bool) -> None:
    for part in path[:-1]:
        tree = tree[part]
    if delete:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


@pytest.mark.parametrize("format", [1, 2])
@fuzz(short=40, full=1500)
@given(data=st.data())
def test_a_manifest_of_any_values_is_refused_or_read(pristine, format, data):
    """Its checksum is made right each time: what is checked is every check behind it."""
    run = pristine[format]
    text = (run / "chain.json").read_text()
    tree = json.loads(text)
    tree.pop("checksum", None)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(tree)))
        change(tree, path, data.draw(VALUES), delete=data.draw(st.booleans()))
    try:
        json.dumps(tree)
    except TypeError:
        return  # keys of several kinds are no JSON
    if tree.get("format") == 2:
        tree["checksum"] = _checksum(json.loads(json.dumps(tree)))
    (run / "chain.json").write_text(json.dumps(tree))
    try:
        inspect_run(run)
        RunDirectory(run).load_links()
    except ChainLoRAError as error:
        check_error(error)
    finally:
        (run / "chain.json").write_text(text)


@fuzz(short=60, full=2000)
@given(data=st.data())
def test_an_adapter_of_any_bytes_is_refused_or_read(pristine, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    shutil.copytree(pristine[1] / "links" / "000", folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        limit = len(content) if data.draw(st.booleans()) else min(len(content), 300)  # the header
        content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / name).write_bytes(content)
    try:
        load_adapter(folder)
    except RunError as error:
        check_error(error)
