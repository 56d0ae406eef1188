"""What is longer than the context: blocks of text that lose nothing, cuts that are told."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest
from helpers import settings as run_settings
from helpers import stage_dir
from helpers_data import CHAT, TALK, encode_examples, make_tokenizer, scored
from helpers_tasks import write_rows, write_task
from hypothesis import given, settings
from hypothesis import strategies as st

from chainlora import train
from chainlora.config.schema import DataConfig
from chainlora.data import preparing
from chainlora.data.splits import prepare_splits
from chainlora.errors import DataError


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(alphabet="ab é\n.Yestgrail", min_size=1, max_size=120),
    special=st.sampled_from(["", "bos", "bos eos"]),
    limit=st.integers(3, 30),
)
def test_blocks_of_a_text_learn_every_token_once_from_the_one_before(text, special, limit):
    tokenizer = make_tokenizer(special)
    front = [0] if special else []
    whole = front + tokenizer(text, add_special_tokens=False)["input_ids"] + [1]
    if len(whole) < 2:
        return
    blocks = encode_examples([{"text": text}], tokenizer, "text", max_length=limit)
    learned = []
    for block in blocks:
        ((ids,), ((span,),)) = block.sequences, block.scored
        assert len(ids) <= limit
        assert list(ids[: len(front)]) == front
        assert block.row == 0
        learned += [(ids[at - 1], ids[at]) for at in range(*span)]
    assert learned == list(pairwise(whole))
    most = limit - len(front) - 1  # tokens that a block adds: there are as few blocks as can be
    assert (len(blocks) - 1) * most < len(whole)


def test_a_run_on_a_long_text_trains_on_all_of_it_and_says_so(tiny_folder, tmp_path, capsys):
    path = write_rows(tmp_path / "book.jsonl", [{"text": "the cat sat on a mat " * 400}])
    tree = run_settings(tiny_folder, tmp_path, tmp_path / "run")
    tree["data"] = {"train": str(path)}
    tree["chain"] = {"ranks": [2], "epochs": [1]}
    seen = []
    result = train(tree, listener=seen.append, progress=True)
    assert "blocks, no token lost\n" in capsys.readouterr().err
    assert result["scored_tokens"] == 400 * 6 + 1  # words and the end of the text, its start not
    data = {"train": {"rows": 1, "examples": result["rows"], "rows_split": 1}}
    assert {k: v for k, v in result["data"]["train"].items() if k != "tokens"} == data["train"]
    assert seen[0]["data"] == result["data"]
    written = json.loads((stage_dir(tmp_path / "run") / "result.json").read_text())
    assert written["data"] == result["data"]


ASK = TALK[0]


@pytest.mark.parametrize("format", ["text", "completion", "chat"])
def test_what_a_cut_takes_is_counted_and_told_once(tmp_path, caplog, format):
    rows = {
        "text": [{"text": "dogs and cats " * n} for n in (1, 9, 30)],
        "completion": [{"prompt": "dogs and cats " * n, "completion": "two"} for n in (1, 9, 30)],
        "chat": [{"messages": [ASK | {"content": "dogs " * n}, *TALK[1:]]} for n in (1, 20, 60)],
    }[format]
    tokenizer = make_tokenizer("bos", CHAT)
    whole = encode_examples(rows, tokenizer, format)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataConfig(train=str(path), max_length=24, truncation="cut")
    with caplog.at_level(logging.WARNING, logger="chainlora"):
        splits = prepare_splits(data, tokenizer, 128)
    lost = sum(max(0, len(example.sequences[0]) - 24) for example in whole)
    assert lost > 0
    summary = splits.train.summary
    assert (summary.rows, summary.tokens_cut) == (3, lost)
    assert summary.rows_cut == sum(len(example.sequences[0]) > 24 for example in whole)
    (record,) = caplog.records
    assert record.message.startswith(f"train: {summary.rows_cut} of 3 rows were longer")
    assert f"; {lost} tokens were cut" in record.message


def answers(*lengths: int) -> list[dict]:
    return [{"prompt": f"{n}" + " dogs" * n, "completion": " two", "label": 0} for n in lengths]


def pairs(*lengths: int) -> list[dict]:
    return [{"prompt": r["prompt"], "chosen": " two", "rejected": " no"} for r in answers(*lengths)]


LONG = {
    "text": (lambda *ns: [{"text": "dogs " * n} for n in ns], None),
    "completion": (answers, None),
    "chat": (lambda *ns: [{"messages": [TALK[0] | {"content": "dogs " * n}, TALK[1]]} for n in ns],
             None),
    "pairs": (pairs, "dpo"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "in_memory"), [*((kind, True) for kind in LONG), ("pairs", False)]
)
def test_rows_that_are_too_long_are_left_out_counted_and_told(
    tmp_path, cache, caplog, monkeypatch, kind, in_memory
):
    if not in_memory:
        monkeypatch.setattr(preparing, "IN_MEMORY", 0)
    rows, loss = LONG[kind]
    train = write_rows(tmp_path / "train.jsonl", rows(1, 90, 2, 80, 3))
    test = write_rows(tmp_path / "test.jsonl", rows(4, 70))
    data = {"train": str(train), "test": str(test), "max_length": 60, "truncation": "drop"}
    tokenizer = make_tokenizer("bos", CHAT)
    with caplog.at_level(logging.WARNING, logger="chainlora"):
        splits = prepare_splits(DataConfig(**data), tokenizer, 128, loss=loss)
    assert [example.row for example in splits.train] == [0, 2, 4]
    assert [example.row for example in splits.test] == [0]
    report = splits.report()
    counts = [[report[split][key] for key in ("rows", "rows_dropped", "examples")]
              for split in ("train", "test")]  # fmt: skip
    assert counts == [[5, 2, 3], [2, 1, 1]]
    told = [record.message for record in caplog.records]
    assert told[0].startswith("train: 2 of 5 rows were longer than data.max_length")
    assert told[1].startswith("test: 1 of 2 rows were longer")
    assert told[1].endswith("are left out (truncation: drop)")
    write_rows(train, rows(90, 80))
    with pytest.raises(
        DataError, match=r"at least one row must fit .*got 2 longer rows, up to \d+ tokens"
    ):
        prepare_splits(DataConfig(**data), tokenizer, 128, loss=loss)


@pytest.mark.parametrize("loss", ["completion", "candidates"])
def test_a_row_that_leaves_no_room_to_be_scored_is_not_held_out(tmp_path, loss):
    """A row may fit as it is trained on, and not with room for an answer, or all candidates."""
    answer = {"labels": [" two", " a dog" * 10]} if loss == "candidates" else {
        "completion": "{{ completion }}", "references": "completion", "metric": "em",
        "max_new_tokens": 45, "add_eos": True, "labels": None,
    }  # fmt: skip
    task = write_task(tmp_path, prompt="{{ prompt }}", loss="completion", **answer)
    path = write_rows(tmp_path / "train.jsonl", answers(*range(1, 30)))
    data = {"task": str(task), "train": str(path), "validation": 0.5, "max_length": 60}
    data = DataConfig(**data, truncation="drop")
    splits = prepare_splits(data, make_tokenizer("bos"), 128)
    held_out = {example.row for example in splits.validation}
    trained = {example.row for example in splits.train}
    refused = data.model_copy(update={"truncation": "error"})
    with pytest.raises(DataError, match=r"held-out rows must fit .*got \d+ rows that do not"):
        prepare_splits(refused, make_tokenizer("bos"), 128)
    rows = answers(*range(1, 30))  # those that are trained on need no room
    left = write_rows(path, [row for n, row in enumerate(rows) if n in held_out | trained])
    few = refused.model_copy(update={"train": str(left)})
    again = prepare_splits(few, make_tokenizer("bos"), 128, bound=splits.bound)
    assert (len(again.train), len(again.validation)) == (len(trained), len(held_out))
    with pytest.raises(DataError, match="a row must fit the context"):  # not left out unseen
        prepare_splits(few, make_tokenizer("bos"), 128, to_score="train", bound=splits.bound)
    write_rows(path, rows)
    assert held_out
    assert not held_out & trained
    assert max(held_out) < max(trained)
    again = prepare_splits(data, make_tokenizer("bos"), 128, to_score="train", bound=splits.bound)
    assert {example.row for example in again.train} < trained


@pytest.mark.parametrize("template", [CHAT, "{{ bos_token }}" + CHAT])
def test_a_cut_chat_keeps_the_start_that_its_template_writes(template):
    """Whatever the tokenizer would add itself; where nothing was written, nothing is put."""
    talk = [{"role": "user", "content": "dogs " * 60}, *TALK[1:]]
    for special in ("", "bos"):
        tokenizer = make_tokenizer(special, template)
        (whole,), (cut,) = (
            encode_examples([{"messages": talk}], tokenizer, "chat", **keys)
            for keys in ({}, {"max_length": 24, "truncation": "cut"})
        )
        assert scored(cut, tokenizer) == [["three</s>"]]  # the oldest turns are gone
        (whole,), (cut,) = whole.sequences, cut.sequences
        begun = int(template != CHAT)
        assert whole[:1] == cut[:1] or not begun
        assert cut[begun:] == whole[begun - 24 :]
        assert (cut[0] == tokenizer.bos_token_id) == begun


@pytest.mark.parametrize(
    ("rows", "unread"),
    [
        ([{"text": "dogs", "id": 1}, {"text": "cats", "source": "web"}], "'id', 'source'"),
        ([{"prompt": "dogs", "completion": " two", "system": "Be short."}], "'system'"),
        (
            [{"messages": [*TALK[:1], {**TALK[1], "weight": 1, "name": None}], "documents": ["a"]}],
            "'documents', 'messages[].weight'",
        ),
        (  # the template knows `add_generation_prompt`, which is another word
            [{"messages": [TALK[0], {**TALK[1], "generation": "…"}],
              "chat_template_kwargs": {"think": True, "prompt": "x", "eos": None}}],
            "'chat_template_kwargs.prompt', 'chat_template_kwargs.think', 'messages[].generation'",
        ),
        (
            [{"conversations": [{"from": "gpt", "value": "a", "train": False, "html": None}]}],
            "'conversations[].train'",
        ),
    ],
    ids=["text", "completion", "chat", "arguments", "sharegpt"],
)  # fmt: skip
def test_columns_that_nothing_reads_are_named_once(tmp_path, caplog, rows, unread):
    path = write_rows(tmp_path / "rows.jsonl", rows * 20)
    with caplog.at_level(logging.WARNING, logger="chainlora"):
        splits = prepare_splits(DataConfig(train=str(path)), make_tokenizer("", CHAT), 128)
    assert [record.message for record in caplog.records] == [f"train: not read: {unread}"]
    assert splits.report()["train"]["unread"] == [name.strip("'") for name in unread.split(", ")]


@pytest.mark.parametrize("kind", ["text", "completion", "pairs", "candidates", "right one"])
def test_rows_to_score_that_are_trained_on_are_named(tmp_path, caplog, kind):
    """Whatever is learned of them; what is held out is none of them."""
    makers = {
        "text": lambda k: {"text": f"{k}" + " two dogs" * 20},
        "completion": lambda k: {"prompt": f"how many {k}?", "completion": " two", "id": k},
        "pairs": lambda k: {"prompt": f"dogs {k}", "chosen": " two", "rejected": " three"},
    }
    make = makers.get(kind, lambda k: {"text": f"dogs {k}", "label": k % 2})
    files = {
        "train": [make(k) for k in (0, 1, 2, 2, 3, 4, 5)],
        "validation": [make(k) for k in (7, 2, 3, 8, 5, 4)],
        "test": [make(k) for k in (0, 9, 0)],
    }
    paths = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()
    }
    if kind in ("candidates", "right one"):
        loss = "candidates" if kind == "candidates" else "completion"
        paths["task"] = str(write_task(tmp_path, loss=loss))
    loss = "dpo" if kind == "pairs" else None
    prepare_splits(DataConfig(**paths), make_tokenizer("bos"), 24, loss=loss)
    told = [record.message for record in caplog.records if "too good" in record.message]
    named = {"validation": (2, 3, 5), "test": (1, 3)}
    lines = [", ".join(f"{paths[name]} line {k}" for k in at) for name, at in named.items()]
    because = "rows are training rows too, so that scores on them are too good"
    remedy = "remove them from one of the files"
    assert told == [
        f"validation: 4 of 6 {because} ({lines[0]}, …); {remedy}",
        f"test: 2 of 3 {because} ({lines[1]}); {remedy}",
    ]
    assert "data.num" not in caplog.text
    caplog.clear()
    held = DataConfig(**paths | {"validation": 0.5, "test": None, "num_test": 3})
    splits = prepare_splits(held, make_tokenizer("bos"), 24, loss=loss)
    assert splits.validation
    assert "too good" not in caplog.text
    assert "data.num_test has no effect without a file in data.test" in caplog.text


def test_rows_held_out_are_the_same_rows_where_each_encoding_drops_others(tmp_path):
    """As it is learned one row is too long for its end, as it is scored another for a label."""
    labels = {"labels": [" a", " two dogs and three cats"], "metric": "accuracy"}
    task = write_task(tmp_path, prompt="{{ prompt }}", loss="completion", add_eos=True, **labels)
    rows = answers(20, *range(1, 13), 21)
    rows[0]["label"] = 1  # of the two long ones, the shorter has the longer answer
    data = {"task": str(task), "train": str(write_rows(tmp_path / "train.jsonl", rows))}
    for limit in range(25, 45):
        keys = data | {"validation": 0.5, "max_length": limit, "truncation": "drop"}
        splits = prepare_splits(DataConfig(**keys), make_tokenizer("bos"), 128)
        trained = {example.row for example in splits.train}
        assert not trained & {example.row for example in splits.validation}
