"""Rows of other tools become the same examples as the rows of our own formats that they mean."""

from __future__ import annotations

import logging

import pytest
from helpers_data import CHAT, MARKED, TALK, encode_examples, make_tokenizer, scored
from helpers_tasks import write_rows

from chainlora.config.schema import DataConfig
from chainlora.data.splits import check_files, prepare_splits
from chainlora.errors import DataError

SHAREGPT = [
    {"from": "human", "value": "how many dogs?"},
    {"from": "gpt", "value": "two dogs"},
    {"from": "user", "value": "and cats?"},
    {"from": "assistant", "value": "three"},
]
RULE = {"role": "system", "content": "count"}
ALPACA = {"instruction": "how many dogs?", "input": "two dogs", "output": "two"}


def same(row: dict, ours: dict, template: str = CHAT) -> None:
    """Hold the examples of a row to those of ours, tokens and targets."""
    tokenizer = make_tokenizer("bos", template)
    (found,), (expected,) = (encode_examples([r], tokenizer, "auto") for r in (row, ours))
    assert (found.sequences, found.scored) == (expected.sequences, expected.scored)
    assert found.references == expected.references


def test_sharegpt_is_chat():
    same({"conversations": SHAREGPT}, {"messages": TALK})
    same({"conversations": SHAREGPT}, {"messages": TALK}, MARKED)
    same({"conversations": SHAREGPT, "system": "count"}, {"messages": [RULE, *TALK]})
    asked = {"from": "system", "value": "count"}
    same({"conversations": [asked, *SHAREGPT]}, {"messages": [RULE, *TALK]})


@pytest.mark.parametrize("asked", [{"from": "system", "value": "count"}, RULE], ids=str)
def test_a_system_column_and_a_system_turn_are_one_message(asked):
    turns = [asked, *(TALK if "role" in asked else SHAREGPT)]
    for system in ("count", "", None):
        same({"conversations": turns, "system": system}, {"messages": [RULE, *TALK]})
    with pytest.raises(DataError, match=r"must have one `system` text \(got .*'other', 'count'"):
        same({"conversations": turns, "system": "other"}, {"messages": TALK})


def test_alpaca_is_chat_where_there_is_a_template():
    question = {"role": "user", "content": "how many dogs?\ntwo dogs"}
    answer = {"role": "assistant", "content": "two"}
    same(ALPACA, {"messages": [question, answer]})
    question = {"role": "user", "content": "how many dogs?"}
    for nothing in ("", None):
        same(ALPACA | {"input": nothing}, {"messages": [question, answer]})


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
        (["pair"], "text", "validation: rows are text, and those trained on completion"),
        (["text"], "pair", "validation: rows are completion, and those trained on text"),
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


def test_what_was_recognised_is_reported(tmp_path, caplog):
    tokenizer = make_tokenizer("", CHAT)
    rows = [{"conversations": SHAREGPT, "id": "a"}] * 2
    data = DataConfig(train=str(write_rows(tmp_path / "rows.jsonl", rows)))
    found = prepare_splits(data, tokenizer, 128).report()["train"]
    assert (found["recognised"], found["rows"], found["unread"]) == ("sharegpt", 2, ["id"])
    assert "train: nothing reads 'id'" in caplog.text
    data = data.model_copy(update={"format": "sharegpt"})
    assert "recognised" not in prepare_splits(data, tokenizer, 128).report()["train"]
