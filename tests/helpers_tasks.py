"""Tasks and rows that several test modules use. The rows here are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from conftest import write_rows

# One row a task and, letter for letter, what a model reads: the protocol's table with its fields
# filled in ("/" there is a line break). The third entry is the text of each candidate, or the
# completion.
PROMPTS = {
    "sst2": (
        {"sentence": "a warm and funny film . ", "label": 1},
        "a warm and funny film . It was",
        (" terrible", " great"),
        1,
    ),
    "rte": (
        {"premise": "Rain fell all day.", "hypothesis": "It rained.", "label": "entailment"},
        'Rain fell all day.\nDoes this mean that "It rained." is true? Yes or No?\n',
        ("Yes", "No"),
        0,
    ),
    "cb": (
        {
            "premise": "She doubted that the ship had sailed.",
            "hypothesis": "the ship had sailed",
            "label": "neutral",
        },
        'Suppose She doubted that the ship had sailed. Can we infer that "the ship had sailed"? '
        "Yes, No, or Maybe?\n",
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": (
        {"passage": "Tea -- Tea is a drink.", "question": "is tea a drink", "label": True},
        "Tea -- Tea is a drink. Is tea a drink?",
        (" Yes", " No"),
        0,
    ),
    "wsc": (
        {
            "text": "Ann thanked Eve because She had helped.",
            "label": True,
            "target": {
                "span1_text": "Eve",
                "span2_text": "She",
                "span1_index": 2,
                "span2_index": 4,
            },
        },
        "Ann thanked Eve because She had helped.\n"
        'In the previous sentence, does the pronoun "she" refer to Eve? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "wic": (
        {
            "word": "bank",
            "sentence1": "We sat on the bank.",
            "sentence2": "The bank was shut.",
            "label": False,
        },
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "We sat on the bank.\nThe bank was shut.\n",
        ("No", "Yes"),
        0,
    ),
    "multirc": (
        {
            "paragraph": "Tom has two dogs.",
            "question": "Who has dogs?",
            "answer": "Tom",
            "label": 1,
        },
        "Tom has two dogs.\nQuestion: Who has dogs?\n"
        'I found this answer "Tom". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        {
            "premise": "The cup broke.",
            "choice1": "It fell.",
            "choice2": "I washed it.",
            "question": "cause",
            "label": 0,
        },
        "The cup broke because",
        (" it fell.", " I washed it."),
        0,
    ),
    "gsm8k": (
        {
            "question": "Two boxes hold 4 pens each. How many pens?",
            "answer": "2*4 = <<2*4=8>>8 pens.\n#### 8",
        },
        "Question: Two boxes hold 4 pens each. How many pens?\nAnswer:",
        " 2*4 = <<2*4=8>>8 pens.\n#### 8",
        ("8",),
    ),
}

# What the same task calls its fields and labels on the Hub, where that differs from the original
# files.
HUB_LABELS = {"rte": 0, "cb": 2, "boolq": 1, "wic": 0}
HUB_ROWS = {name: PROMPTS[name][0] | {"label": label} for name, label in HUB_LABELS.items()}
HUB_ROWS["wsc"] = {
    "text": "Ann thanked Eve because She had helped.",
    "span1_text": "Eve",
    "span2_text": "She",
    "label": 1,
}


def write_as(path: Path, rows: list[dict]) -> Path:
    """Write rows as what the file's suffix says, Parquet in pieces of 20 rows."""
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        pieces = {"row_group_size": 20, "compression": "none", "use_dictionary": False}
        pyarrow.parquet.write_table(table, path, **pieces)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)
    return path


def write_task(folder: Path, **changes) -> Path:
    keys = {
        "name": "colour",
        "description": "Made up.",
        "prompt": "{{ text }} It is",
        "labels": [" red", " blue"],
        "metric": "accuracy",
        "loss": "candidates",
    } | changes
    path = folder / "colour.yaml"
    path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    return path


def make_split(path: Path, num_rows: int) -> None:
    write_rows(path, [{"text": f"t{i}", "label": i % 2} for i in range(num_rows)])
