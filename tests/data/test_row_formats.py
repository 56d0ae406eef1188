"""The formats of docs/rows.md, rows of other tools among them: learned is what TRL learns."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import write_rows
from helpers import as_row
from helpers_data import CHAT, TALK, encode_examples, make_tokenizer, scored
from helpers_integrations import arguments, plain_model

from chainlora import train
from chainlora.config.schema import DataConfig
from chainlora.data.encoding import detect_format
from chainlora.data.splits import check_files, prepare_splits
from chainlora.data.templates import set_chat_template
from chainlora.errors import DataError

ASK = {"role": "user", "content": "How many legs has a dog?"}
ANSWER = {"role": "assistant", "content": "Four."}
MORE = [{"role": "user", "content": "And a spider?"}, {"role": "assistant", "content": "Eight."}]
SYSTEM = {"role": "system", "content": "Count."}
TOOL = {
    "type": "function",
    "function": {
        "name": "legs",
        "description": "Legs of an animal.",
        "parameters": {"type": "object", "properties": {"animal": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "legs", "arguments": {"animal": "dog"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CALLED = [ASK, CALLS, {"role": "tool", "content": "4"}, ANSWER]
CALLED_IN_JSON = json.loads(json.dumps(CALLED).replace('{"animal": "dog"}', '"{\\"animal\\": 1}"'))
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% if think %}<think>{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


class Case(NamedTuple):
    """One format: the row as it is written, and what of a config goes with it."""

    name: str
    row: Mapping[str, Any]
    keys: Mapping[str, Any] = {}
    ours: Mapping[str, Any] = {}  # a row of our own formats that it means, if it is another tool's


IN_PARTS = [
    turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in (ASK, ANSWER)
]
ALPACA = {"instruction": ASK["content"], "output": ANSWER["content"]}
PLAIN = {"chat_template": None}
TASK = "Below is an instruction that describes a task"
WRITE = (
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHow many legs has a dog?\n\n"
)
CHATML = {"chat_template": "chatml"}
CASES = [
    Case("plain text, columns beside it", {"text": "A dog has four legs.", "id": 7}),
    Case("prompt and completion", {"prompt": "Legs of a dog:", "completion": " four"}),
    Case("both that share a token", {"prompt": "Legs of a dog: ", "completion": "four"}),
    Case("chat of turns, one of system", {"messages": [SYSTEM, ASK, ANSWER, *MORE]}, CHATML),
    Case("chat with tools", {"messages": CALLED, "tools": [TOOL]}, CHATML),
    Case("chat with tools in JSON", {"messages": CALLED, "tools": json.dumps([TOOL])}, CHATML),
    Case("calls with arguments in JSON", {"messages": CALLED_IN_JSON}, CHATML),
    Case("content as parts", {"messages": IN_PARTS}, CHATML),
    Case(
        "chat with arguments of the template",
        {"messages": [ASK, ANSWER], "chat_template_kwargs": {"think": True}},
        {"chat_template": THINKS},
    ),
    Case(
        "conversational prompt and completion",
        {"prompt": [ASK, ANSWER, MORE[0]], "completion": [MORE[1]]},
        CHATML,
    ),
    Case(
        "ShareGPT with a system column",
        {
            "system": SYSTEM["content"],
            "conversations": [
                {"from": "human", "value": ASK["content"]},
                {"from": "gpt", "value": ANSWER["content"]},
                {"from": "user", "value": MORE[0]["content"]},
                {"from": "assistant", "value": MORE[1]["content"]},
            ],
        },
        CHATML,
        {"messages": [SYSTEM, ASK, ANSWER, *MORE]},
    ),
    Case(
        "chat in a column `conversations`",
        {"conversations": [ASK, ANSWER]},
        CHATML,
        {"messages": [ASK, ANSWER]},
    ),
    Case(
        "Alpaca, with a chat template",
        ALPACA | {"input": "Rex"},
        CHATML,
        {"messages": [ASK | {"content": f"{ASK['content']}\nRex"}, ANSWER]},
    ),
    Case(
        "Alpaca, without one",
        ALPACA | {"input": "Rex"},
        PLAIN,
        {
            "prompt": f"{TASK}, paired with an input that provides further context. {WRITE}"
            "### Input:\nRex\n\n### Response:\n",
            "completion": "Four.",
        },
    ),
    Case(
        "Alpaca, without one and without an input",
        ALPACA,
        PLAIN,
        {"prompt": f"{TASK}. {WRITE}### Response:\n", "completion": "Four."},
    ),
]


@pytest.fixture
def tokenizer(smollm2_tokenizer, monkeypatch):
    """The tokenizer of SmolLM2, whose chat template a test may set."""
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", smollm2_tokenizer.chat_template)
    return smollm2_tokenizer


def read(case: Case, tokenizer: Any, folder: Path) -> Any:
    """Read a case as a run would, from a file."""
    keys = dict(case.keys)
    if "chat_template" in keys and keys["chat_template"] is None:
        tokenizer.chat_template = keys.pop("chat_template")
    path = write_rows(folder / "rows.jsonl", [dict(case.row)])
    (example,) = prepare_splits(DataConfig(train=str(path), **keys), tokenizer, 1024).train
    return example


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_columns_of_other_names_are_the_same_row(case, tmp_path):
    """Also beside columns that have the names of fields, and mean something else."""
    tokenizer = copy.deepcopy(make_tokenizer("bos"))  # quick to read, which templates are set on
    fields = {name: f"their {name}" for name in case.row if name != "id"}
    row = dict.fromkeys(fields, 7) | {fields.get(k, k): v for k, v in case.row.items()}
    expected = read(case, tokenizer, tmp_path)
    for keys in ({"format": detect_format([case.row])}, {}):
        named = case._replace(row=row, keys={**case.keys, "fields": fields, **keys})
        found = read(named, tokenizer, tmp_path)
        assert (found.sequences, found.scored) == (expected.sequences, expected.scored)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "body", "system": "rule"}, "fields of format text: text, .* (got system)"),
        ({"text": "bodi"}, "(got 'bodi', which no row of .* has); .*has id, body, rule)"),
    ],
)
def test_fields_that_the_rows_do_not_have_are_refused(fields, said, tmp_path, tiny_folder):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": 1, "body": "a dog", "rule": "b"}] * 2)
    tree = {"model": str(tiny_folder), "data": {"train": str(path), "fields": fields}}
    with pytest.raises(DataError, match=said.replace("(", r"\(").replace(")", r"\)")):
        train(tree | {"chain": {"ranks": [2], "steps": [1]}})


def labels_of_trl(case: Case, tokenizer: Any, model: Path, output: Path) -> tuple[Any, Any]:
    """Return tokens and labels of TRL's SFTTrainer."""
    pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    keys = {key: value for key, value in case.keys.items() if value is not None}
    set_chat_template(tokenizer, DataConfig(train="x", **keys))
    is_chat = any(isinstance(case.row.get(key), list) for key in ("messages", "prompt"))
    own = {"assistant_only_loss": is_chat, "max_length": None, "bf16": False}
    trainer = SFTTrainer(
        model=plain_model(model),
        args=SFTConfig(**arguments(output, **own)),
        train_dataset=Dataset.from_list([dict(case.row)]),
        processing_class=tokenizer,
    )
    (found,) = trainer.train_dataset
    return found["input_ids"], found["labels"]


@pytest.mark.parametrize("case", [c for c in CASES if not c.ours], ids=lambda case: case.name)
def test_labels_are_those_of_trl(case, tokenizer, tiny_folder, tmp_path):
    ids, labels = labels_of_trl(case, tokenizer, tiny_folder, tmp_path)
    found = read(case, tokenizer, tmp_path)
    assert found.sequences == (tuple(ids),)
    # The first token has no token before it that could predict it: trainers shift labels by one.
    assert as_row(found)["labels"][1:] == labels[1:]


# --- rows of other tools are those of our own formats ---


@pytest.mark.parametrize("case", [c for c in CASES if c.ours], ids=lambda case: case.name)
def test_a_row_of_another_tool_is_the_row_that_it_means(case, tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer("bos"))
    found, expected = (
        read(each, tokenizer, tmp_path) for each in (case, case._replace(row=case.ours))
    )
    assert (found.sequences, found.scored) == (expected.sequences, expected.scored)
    assert found.references == expected.references


SHAREGPT = [
    {"from": "human", "value": "how many dogs?"},
    {"from": "gpt", "value": "two dogs"},
    {"from": "user", "value": "and cats?"},
    {"from": "assistant", "value": "three"},
]
RULE = {"role": "system", "content": "count"}


def same(row: dict, ours: dict, template: str = CHAT) -> None:
    """Hold the examples of a row to those of ours, tokens and targets."""
    tokenizer = make_tokenizer("bos", template)
    (found,), (expected,) = (encode_examples([r], tokenizer, "auto") for r in (row, ours))
    assert (found.sequences, found.scored) == (expected.sequences, expected.scored)
    assert found.references == expected.references


@pytest.mark.parametrize("asked", [{"from": "system", "value": "count"}, RULE], ids=str)
def test_a_system_column_and_a_system_turn_are_one_message(asked):
    turns = [asked, *(TALK if "role" in asked else SHAREGPT)]
    for system in ("count", "", None):
        same({"conversations": turns, "system": system}, {"messages": [RULE, *TALK]})
    with pytest.raises(DataError, match=r"must have one `system` text \(got .*'other', 'count'"):
        same({"conversations": turns, "system": "other"}, {"messages": TALK})


@pytest.mark.parametrize("thoughts", ["", "hm"])
def test_turns_of_a_prompt_are_not_learnt_however_often_a_template_marks_them(thoughts):
    """Thoughts and words are marked apart, and a call not at all."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role != 'assistant' %}{{ m.content }}"
        "{% elif m.tool_calls %}called{% else %}{% generation %}{{ m.thoughts }}{% endgeneration %}"
        "|{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    called = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    prompt = [*TALK[:2], TALK[0], called, {"role": "tool", "content": "4"}]
    row = {"prompt": prompt, "completion": [TALK[3] | {"thoughts": thoughts}]}
    tokenizer = make_tokenizer("", template)
    (found,) = encode_examples([row], tokenizer, "auto")
    assert scored(found, tokenizer) == [[*filter(None, [thoughts]), "three</s>"]]


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        (["pair"], "text", "validation: rows are text, but training rows are completion"),
        (["text"], "pair", "validation: rows are completion, but training rows are text"),
        (["pair", "text"], "text", ""),
        (["pair"], "chat", ""),
    ],
)
def test_text_is_scored_otherwise_than_answers(train, validation, said, tmp_path, caplog):
    rows = {"pair": {"prompt": "a", "completion": "b"}, "text": {"text": "a"}}
    rows |= {"chat": {"messages": TALK}}
    path = {name: str(write_rows(tmp_path / f"{name}.jsonl", [row])) for name, row in rows.items()}
    data = DataConfig(train=[path[name] for name in train], validation=path[validation])
    with caplog.at_level(logging.WARNING, logger="chainlora"):
        check_files(data, None)
    assert [record.message[: len(said)] for record in caplog.records] == [said] * bool(said)
    check_files(data.model_copy(update={"format": "text"}), None)
    assert len(caplog.records) == bool(said)
