"""Small byte-level tokenizers trained on the spot, chat templates, and what examples score."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from conftest import WORDS, byte_level, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from chainlora.data.encoding import Options, RowEncoder, detect_format
from chainlora.data.sources import Row

CORPUS = [
    "Yes No Maybe great terrible the film was great and the plot was terrible",
    "Does this mean that the premise is true? Yes or No?\nAnswer: it was so because of the rain",
    "Question: how many dogs?\nAnswer: two dogs and three cats\n",
]
# Turns are rendered one after another: a conversation is a prefix of a longer one.
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The template marks the assistant's own words.
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ "
    "m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# Earlier answers are shortened, as templates that drop old reasoning do.
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last or m.role == 'user' else '...' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "how many dogs?"},
    {"role": "assistant", "content": "two dogs"},
    {"role": "user", "content": "and cats?"},
    {"role": "assistant", "content": "three"},
]


@lru_cache
def make_tokenizer(special: str = "", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens; `special` says what it adds: "", "bos" or "bos eos"."""
    adds = None
    if special:
        pattern = "<s> $A </s>" if "eos" in special else "<s> $A"
        adds = TemplateProcessing(single=pattern, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = byte_level(CORPUS * 20, {"bos_token": "<s>", "eos_token": "</s>"}, adds)
    tokenizer.chat_template = chat_template
    return tokenizer


def scored(example, tokenizer) -> list[list[str]]:
    """The text of every scored span."""
    return [
        [tokenizer.decode(ids[begin:stop]) for begin, stop in spans]
        for ids, spans in zip(example.sequences, example.scored, strict=True)
    ]


def encode_examples(rows, tokenizer, task, **options) -> list:
    """Encode rows as a run would; `options` are those of `Options`."""
    kind = detect_format(rows, options.get("objective")) if task == "auto" else task
    encode = RowEncoder(kind, tokenizer, Options(**options))
    named = [
        row if isinstance(row, Row) else Row(row, position, f"row {position}")
        for position, row in enumerate(rows)
    ]
    examples = encode(named)
    encode.summary()  # refuses rows that are too long
    return examples


def pairs(count: int, start: int = 0) -> list[dict]:
    """Rows of preferences: what is good is chosen."""
    words = ["cat", "mat", "hill", "birds", "dog"]
    return [
        {
            "prompt": f"the {words[k % 5]} {words[k // 5 % 5]} was",
            "chosen": f" good {words[k // 2 % 5]}" + " and warm" * (k % 3),
            "rejected": f" bad {words[k // 3 % 5]}" + " and cold" * (k % 2),
        }
        for k in range(start, start + count)
    ]


def pair_files(folder: Path) -> dict[str, str]:
    """Write 40 and 12 pairs to train on and to choose by; return their places."""
    return {
        "train": str(write_rows(folder / "pairs.jsonl", pairs(40))),
        "validation": str(write_rows(folder / "more_pairs.jsonl", pairs(12, 40))),
    }


def rows_of(path: Path, first: int, count: int = 12) -> str:
    """Write rows that ask the same with other words."""
    words = WORDS[first : first + count]
    write_rows(path, [{"prompt": f"say {w}:", "completion": f" {w}"} for w in words])
    return str(path)
