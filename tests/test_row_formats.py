"""The table of row formats in docs/rows.md: what each is read as, what is learned, and whether TRL
learns the same.

`table()` makes the table from the cases below; a test compares it with the document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import write_rows
from transformers import AutoTokenizer

from chainlora.config.schema import DataConfig
from chainlora.data.encoding import detect_format
from chainlora.data.sources import load_rows
from chainlora.data.splits import prepare_splits
from chainlora.errors import DataError

PAGE = Path(__file__).resolve().parents[1] / "docs/rows.md"
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
CALLED = [
    ASK,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "legs", "arguments": {"animal": "dog"}}}
        ],
    },
    {"role": "tool", "content": "4"},
    ANSWER,
]
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
    shown: str
    keys: Mapping[str, Any] = {}
    trl: Mapping[str, Any] | None = {}
    """Columns that TRL gets instead of the row's; None where TRL has no such format."""


CHATML = {"chat_template": "chatml"}
CASES = [
    Case("plain text", {"text": "A dog has four legs."}, '{"text": "A dog has four legs."}'),
    Case(
        "plain text, columns beside it",
        {"text": "A dog has four legs.", "id": 7, "source": "x"},
        '{"text": …, "id": 7, "source": "x"}',
    ),
    Case(
        "plain text, longer than `max_length`",
        {"text": "A dog has four legs. " * 9},
        '{"text": "A dog has four legs. A dog has …"}',
        {"max_length": 20},
        None,
    ),
    Case(
        "prompt and completion",
        {"prompt": "Legs of a dog:", "completion": " four"},
        '{"prompt": "Legs of a dog:", "completion": " four"}',
    ),
    Case(
        "prompt and completion that share a token",
        {"prompt": "Legs of a dog: ", "completion": "four"},
        '{"prompt": "Legs of a dog: ", "completion": "four"}',
    ),
    Case("chat", {"messages": [ASK, ANSWER]}, '{"messages": [user, assistant]}', CHATML),
    Case(
        "chat of several turns with a system turn",
        {"messages": [SYSTEM, ASK, ANSWER, *MORE]},
        '{"messages": [system, user, assistant, user, assistant]}',
        CHATML,
    ),
    Case(
        "chat through the model's own template, without marks",
        {"messages": [SYSTEM, ASK, ANSWER, *MORE]},
        '{"messages": […]}',
        {},
        None,
    ),
    Case(
        "chat with tools",
        {"messages": CALLED, "tools": [TOOL]},
        '{"messages": [user, assistant with tool_calls, tool, assistant], "tools": […]}',
        CHATML,
    ),
    Case(
        "chat with tools in JSON",
        {"messages": CALLED, "tools": json.dumps([TOOL])},
        '{"messages": […], "tools": "[…]"}',
        CHATML,
    ),
    Case(
        "calls with arguments in JSON",
        {"messages": CALLED_IN_JSON},
        '{"tool_calls": [{"function": {"name": …, "arguments": "{…}"}}]}',
        CHATML,
    ),
    Case(
        "content as parts",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
            ]
        },
        '{"messages": [{"role": …, "content": [{"type": "text", "text": …}]}, …]}',
        CHATML,
    ),
    Case(
        "chat with arguments of the template",
        {"messages": [ASK, ANSWER], "chat_template_kwargs": {"think": True}},
        '{"messages": […], "chat_template_kwargs": {"think": true}}',
        {"chat_template": THINKS},
    ),
    Case(
        "conversational prompt and completion",
        {"prompt": [SYSTEM, ASK], "completion": [ANSWER]},
        '{"prompt": [system, user], "completion": [assistant]}',
        CHATML,
    ),
    Case(
        "the same, the prompt of several turns",
        {"prompt": [ASK, ANSWER, MORE[0]], "completion": [MORE[1]]},
        '{"prompt": [user, assistant, user], "completion": [assistant]}',
        CHATML,
    ),
    Case(
        "ShareGPT",
        {
            "conversations": [
                {"from": "human", "value": ASK["content"]},
                {"from": "gpt", "value": ANSWER["content"]},
            ]
        },
        '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}',
        CHATML,
        {"messages": [ASK, ANSWER]},
    ),
    Case(
        "ShareGPT with a system column",
        {
            "system": SYSTEM["content"],
            "conversations": [
                {"from": "user", "value": ASK["content"]},
                {"from": "assistant", "value": ANSWER["content"]},
            ],
        },
        '{"system": …, "conversations": […]}',
        CHATML,
        {"messages": [SYSTEM, ASK, ANSWER]},
    ),
    Case(
        "chat in a column `conversations`",
        {"conversations": [ASK, ANSWER]},
        '{"conversations": [{"role": "user", "content": …}, …]}',
        CHATML,
        {"messages": [ASK, ANSWER]},
    ),
    Case(
        "Alpaca, with a chat template",
        {"instruction": ASK["content"], "input": "", "output": ANSWER["content"]},
        '{"instruction": …, "input": "", "output": …}',
        CHATML,
        {"messages": [ASK, ANSWER]},
    ),
    Case(
        "Alpaca, without one",
        {"instruction": ASK["content"], "input": "Rex", "output": ANSWER["content"]},
        '{"instruction": …, "input": …, "output": …}',
        {"chat_template": None},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nHow many legs has a dog?\n\n### Input:\nRex\n\n### Response:\n",
            "completion": "Four.",
        },
    ),
    Case(
        "preferences",
        {"prompt": "Legs of a dog:", "chosen": " four", "rejected": " two"},
        '{"prompt": …, "chosen": …, "rejected": …}',
        {},
        None,
    ),
    Case(
        "tokens",
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
        '{"input_ids": […], "labels": […]}',
        {},
        None,
    ),
]


class Found(NamedTuple):
    """What a row became."""

    kind: str
    trained: int
    tokens: int
    note: str
    ids: list[tuple[int, ...]]
    labels: list[list[int]]


@pytest.fixture(scope="module")
def read(smollm2_folder, tmp_path_factory):
    """Read a case as a run would, from a file."""

    def call(case: Case) -> Found:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
        keys = dict(case.keys)
        if "chat_template" in keys and keys["chat_template"] is None:
            tokenizer.chat_template = keys.pop("chat_template")
        path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [dict(case.row)])
        data = DataConfig(train=str(path), **keys)
        try:
            splits = prepare_splits(data, tokenizer, 1024)
        except DataError as error:
            return Found(
                "refused", 0, 0, str(error).partition(" (got ")[0].partition(":")[0], [], []
            )
        summary = splits.report()["train"]
        kind = summary.get("recognised") or detect_format(load_rows(path))
        notes = []
        if unread := summary.get("unread"):
            notes.append("nothing reads " + ", ".join(f"`{name}`" for name in unread))
        if summary.get("rows_split"):
            notes.append(f"{summary['examples']} blocks, no token lost")
        examples = list(splits.train)
        ids = [example.sequences[0] for example in examples]
        labels = [_labels(example) for example in examples]
        trained = sum(label != -100 for each in labels for label in each)
        return Found(kind, trained, sum(map(len, ids)), "; ".join(notes), ids, labels)

    return call


def _labels(example: Any) -> list[int]:
    """Labels as trainers have them; the first token is predicted from nothing."""
    (ids,), (spans,) = example.sequences, example.scored
    labels = [-100] * len(ids)
    for begin, stop in spans:
        labels[begin:stop] = ids[begin:stop]
    return labels


@pytest.fixture(scope="module")
def trl_labels(smollm2_folder, tiny_folder, tmp_path_factory):
    """Tokens and labels of TRL's SFTTrainer for a case."""
    pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from chainlora.data.chat_templates import set_chat_template

    output, model = tmp_path_factory.mktemp("trl"), _model(tiny_folder)

    def made(case: Case) -> tuple[list[int], list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
        keys = {key: value for key, value in case.keys.items() if value is not None}
        set_chat_template(tokenizer, DataConfig(train="x", **keys))
        row = dict(case.trl or case.row)
        is_chat = any(isinstance(row.get(key), list) for key in ("messages", "prompt"))
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(output),
                assistant_only_loss=is_chat,
                max_length=None,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        (found,) = trainer.train_dataset
        return found["input_ids"], found["labels"]

    known: dict[str, tuple[list[int], list[int]]] = {}

    def call(case: Case) -> tuple[list[int], list[int]]:
        if case.name not in known:
            known[case.name] = made(case)
        return known[case.name]

    return call


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def is_equal_to_trl(case: Case, found: Found, trl_labels: Any) -> bool:
    ids, labels = trl_labels(case)
    return [tuple(ids)] == found.ids and [labels[1:]] == [each[1:] for each in found.labels]


def table(read: Any, trl_labels: Any) -> str:
    lines = [
        "| rows | as they are written | read as | tokens trained | labels are TRL's | |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = read(case)
        trl = "–"
        if case.trl is not None:
            trl = "yes" if is_equal_to_trl(case, found, trl_labels) else "no"
        trained = f"{found.trained} of {found.tokens}" if found.tokens else "–"
        lines.append(
            f"| {case.name} | `{case.shown}` | {found.kind} | {trained} | {trl} | {found.note} |"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.trl is not None], ids=lambda case: case.name
)
def test_labels_are_those_of_trl(case, read, trl_labels):
    ids, labels = trl_labels(case)
    found = read(case)
    assert found.ids == [tuple(ids)]
    # The first token has no token before it that could predict it: trainers shift labels by one.
    assert [each[1:] for each in found.labels] == [labels[1:]]


def test_rows_md_has_the_table(read, trl_labels):
    made = table(read, trl_labels)
    assert len(CASES) >= 20
    assert made in PAGE.read_text(encoding="utf-8"), f"docs/rows.md must have this table:\n{made}"
