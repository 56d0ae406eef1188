"""Whatever rows, tasks and models hold: our error, or a right value.

No case writes elsewhere (`fuzzing.contained`).
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy

import torch
import yaml
from fuzzing import JSON, VALUES, WORDS, altered, damaged, fuzz, guarded, refusals
from hypothesis import given
from hypothesis import strategies as st

from chainlora import load_task, make_config
from chainlora.data.splits import prepare_splits
from chainlora.errors import ChainLoRAError, ConfigError, DataError, ModelError
from chainlora.models.loading import load_model
from chainlora_lab.protocol import task_file

# --- rows


TURN = {"role": "user", "content": "a"}
ROWS = [
    {"prompt": "the cat", "completion": " sat"},
    {"messages": [TURN, {"role": "assistant", "content": "b"}], "tools": []},
    {"text": "good birds fly", "label": 1},
]
WRITERS = {
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    ".json": json.dumps,
    ".csv": lambda rows: "\n".join(
        ",".join(map(str, row)) for row in [rows[0], *map(dict.values, rows)]
    ),
}


@fuzz(short=40, full=1500)
@given(data=st.data())
@guarded
def test_rows_of_any_values_are_refused_or_tokenised(
    tokenizer, sentiment, tmp_path_factory, cache, data
):
    suffix = data.draw(st.sampled_from(list(WRITERS)))
    kind = data.draw(st.sampled_from(range(len(ROWS))))
    rows = altered(data, [deepcopy(ROWS[kind]) for _ in range(3)], JSON)
    if suffix == ".csv" and not all(isinstance(row, dict) for row in rows):
        return
    content = WRITERS[suffix](rows).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 3)) == 0:
        content = damaged(data, content or b" ")
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    path.write_bytes(content)
    keys = {"train": str(path)}
    if kind == 2 and data.draw(st.booleans()):
        keys["task"] = str(sentiment / "task.yaml")
    if data.draw(st.booleans()):
        keys |= {"truncation": "left", "max_length": 5}
    config = make_config({"model": "m", "data": keys, "chain": {"ranks": [2], "steps": [1]}})
    with refusals(DataError, ConfigError):
        for example in prepare_splits(config.data, tokenizer, 128).train:
            assert all(0 <= t < len(tokenizer) for ids in example.sequences for t in ids)


# --- tasks

TASKS = ("sst2", "gsm8k", "copa")
TEMPLATES = st.one_of(
    WORDS,
    st.lists(
        st.sampled_from(
            ["{{ text }}", "{{ text", "{% for i in range(9) %}", "{% endfor %}", "{% if %}",
             "{{ ''.__class__.__mro__ }}", "{{ text * 9 }}", "{{ self }}", "{% include 'a' %}",
             "{{ text.split()[9] }}", "{{ label ** label }}", "{% set x = [] %}{{ x.append(x) }}",
             "{{ cycler.__init__.__globals__.os.system('id') }}", "{# #}", "{{ 1 / 0 }}"]
        ),
        max_size=4,
    ).map("".join),
)  # fmt: skip
ROW = {"text": "film", "sentence": "film", "label": 1, "question": "q", "answer": "a #### 1"}


@fuzz(short=30, full=800)
@given(data=st.data())
@guarded
def test_a_task_of_any_values_is_refused_or_renders(tmp_path_factory, data):
    found = load_task(task_file(data.draw(st.sampled_from(TASKS))))
    told = json.loads(found.model_dump_json(exclude_defaults=True))
    altered(data, told, st.one_of(VALUES, TEMPLATES))
    path = tmp_path_factory.getbasetemp() / "task.yaml"
    text = yaml.safe_dump(told, allow_unicode=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with refusals(ChainLoRAError):
        task = load_task(path)
        rendered = task.render_all([altered(data, dict(ROW), JSON)])[0]
        assert isinstance(rendered.prompt, str)


# --- models


@fuzz(short=10, full=600)
@given(data=st.data())
@guarded
def test_a_model_folder_of_any_values_is_refused_or_loads(tiny_folder, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_folder, folder)
    name = data.draw(st.sampled_from([*["config.json"] * 4, "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors"]))  # fmt: skip
    content = (folder / name).read_bytes()
    if name in ("model.safetensors", "tokenizer.json") or data.draw(st.integers(0, 3)) == 0:
        content = damaged(data, content)
    else:
        content = json.dumps(altered(data, json.loads(content), JSON)).encode()
    (folder / name).write_bytes(content)
    with refusals(ModelError):
        load_model(folder, torch.float32)
