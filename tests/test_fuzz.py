"""Whatever configs, overrides, histories and adapters hold: an error of ours, or a right value.

No case writes elsewhere (`fuzzing.contained`). ``CHAINLORA_FULL=1`` runs more
than 10,000 cases, here and in test_fuzz_inputs.py; without it a few hundred.
"""

from __future__ import annotations

import re
import shutil
import string
from copy import deepcopy
from pathlib import Path

import pytest
from config.test_command_line_keys import KEYS as KNOWN
from fuzzing import VALUES, WORDS, check_error, damaged, fuzz, guarded, plant, refusals
from helpers import settings
from hypothesis import given
from hypothesis import strategies as st

from chainlora import load_config, make_config, train
from chainlora.chain.adapters import import_adapter
from chainlora.cli.main import run as command
from chainlora.config.reading import dump_config
from chainlora.config.yaml_text import parse_yaml
from chainlora.errors import ChainLoRAError, ConfigError

KEYS = st.one_of(
    st.sampled_from(KNOWN),
    st.text(string.ascii_lowercase + "._", max_size=8),
    WORDS,
)
GOOD = {"model": "m", "data": {"train": "t"}, "chain": {"ranks": [2], "steps": [1]}}


# --- configs


@fuzz(short=60, full=4000)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=4))
@guarded
def test_a_config_of_any_values_is_refused_or_comes_back_the_same(tmp_path_factory, pairs):
    tree = deepcopy(GOOD)
    for key, value in pairs:
        plant(tree, key, value)
    try:
        config = make_config(tree)
    except ConfigError as error:
        check_error(error)
        return
    assert make_config(parse_yaml(dump_config(config))) == config


LINES = ["model: m\n", "chain:\n", "  ranks: [2]\n", "  steps: [1]\n", "&a [*a]", "- "]
PIECES = st.one_of(WORDS, st.text(max_size=5), st.sampled_from(LINES))


@fuzz(short=50, full=3000)
@given(st.lists(PIECES, max_size=12), st.binary(max_size=6))
@guarded
def test_a_file_of_any_text_is_refused_or_makes_a_config(tmp_path_factory, pieces, noise):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes("".join(pieces).encode("utf-8", "replace") + noise)
    with refusals(ConfigError):
        load_config(path)


@fuzz(short=30, full=500)
@given(st.lists(st.one_of(KEYS.map("--{}".format), WORDS, st.text(max_size=6)), max_size=4))
@guarded
def test_arguments_of_any_text_end_with_a_status(tmp_path_factory, capsys, words):
    path = tmp_path_factory.getbasetemp() / "good.yaml"
    path.write_text("model: /no/such/model\ndata: {train: t}\nchain: {ranks: [2], steps: [1]}\n")
    for verb in (["train", str(path), "--output", "/no/such/run", "--resume"], ["inspect"]):
        # no operating system passes on an argument with a zero byte or half a surrogate pair
        status = command([*verb, *(re.sub("[\0\ud800]", "", word) for word in words)])
        err = capsys.readouterr().err
        assert status in (0, 1, 2), err
        assert "--debug" not in err
        assert "Traceback" not in err


# --- what lies in a run directory


@pytest.fixture(scope="module")
def pristine(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A finished run with a best point inside a link."""
    run = tmp_path_factory.mktemp("fuzz") / "run"
    keys = {"keep_best": True, "eval_every": 1, "select_metric": "accuracy"}
    train(settings(tiny_folder, sentiment, run, train=keys))
    return run


@fuzz(short=60, full=2000)
@given(data=st.data())
@guarded
def test_an_adapter_of_any_bytes_is_refused_or_read(pristine, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    link = next((pristine / "links").iterdir())
    shutil.copytree(link, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    (folder / name).write_bytes(damaged(data, (folder / name).read_bytes()))
    with refusals(ChainLoRAError):
        import_adapter(folder)
