"""Make what every contestant reads: the model's folder, and the rows of a workload in the order of
training.

Runs in a child of its own, so that the process that starts the others stays small. Rows are drawn
once and written to files; ours reads its own formats, the peers read prompts, candidates and
completions in the order in which ours will visit them, and so get the same batches.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from chainlora.data.mixture import epoch_order
from chainlora.data.sources import find_source
from chainlora.data.tasks import Rendered, load_task
from chainlora_lab.protocol import PROTOCOLS, CellData, Rows, read_split, task_file

SEED = 0


# Llamas of random weights: one where overhead shows, and some larger than the real model.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "hidden_size": 1152,
        "intermediate_size": 4608,
        "num_hidden_layers": 24,
        "num_attention_heads": 18,
        "num_key_value_heads": 6,
    },
    "1.3b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def random_folder(shape: str, model: str, folder: Path) -> str:
    """Make a Llama of one of `SHAPES` with the model's own tokenizer; the large in bfloat16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPES[shape],
    )
    made = LlamaForCausalLM(config)
    (made if shape == "tiny" else made.bfloat16()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def workload_files(
    workload: str, data: str | None, num_rows: int, batch_size: int, folder: Path
) -> dict[str, str]:
    """Write the files of a workload and return their paths by use."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, split = workload.partition("-")
    if name == "chat":
        return _chat_files(data, num_rows, batch_size, folder)
    if name == "preferences":
        return _preference_files(data, num_rows, batch_size, folder)
    if name == "long":
        return _long_files(data, int(split), num_rows, batch_size, folder)
    if name not in PROTOCOLS:
        raise ValueError(f"workload must be a task of the lab or chat (got {workload!r})")
    rows = read_split(CellData(task=name, dir=data), split or "train")
    if split:
        return _evaluation_files(name, rows[:num_rows], folder)
    drawn = random.Random(SEED).sample(rows, num_rows)
    return _training_files(name, drawn, batch_size, folder)


def _order(num_rows: int, batch_size: int) -> list[int]:
    """The order in which ours visits rows in its first epoch."""
    order = epoch_order(np.zeros(num_rows, int), batch_size, SEED, 0, group_by_length=False)
    return order.rows.tolist()


def _training_files(name: str, rows: Rows, batch_size: int, folder: Path) -> dict[str, str]:
    task = load_task(task_file(name))
    shown = task.render_all(rows)
    order = _order(len(rows), batch_size)
    ordered = [_scored(shown[i]) | {"completion": shown[i].completion} for i in order]
    paths = {"ordered": _write(folder / "ordered.jsonl", ordered)}
    if task.completion is not None:  # prompts and completions, as a user's own file
        pairs = [{"prompt": one.prompt, "completion": one.completion} for one in shown]
        return paths | {"rows": _write(folder / "rows.jsonl", pairs)}
    paths["rows"] = _write(folder / "rows.jsonl", [dict(row) for row in rows])
    for objective in ("completion", "candidates"):
        paths[f"task_{objective}"] = _task_file(name, folder / f"{objective}.yaml", loss=objective)
    return paths


def _evaluation_files(name: str, rows: Rows, folder: Path) -> dict[str, str]:
    """Rows to score, under a prompt without blanks at its end and candidates that begin with one.

    lm-eval moves blanks at the end of a context into the continuation, which would make every
    candidate two tokens long and cost it its one-pass path; with this prompt both sides score the
    same single tokens.
    """
    raw = _raw_task(name)
    labels = {key: f" {word.strip()}" for key, word in raw["labels"].items()}
    path = _task_file(name, folder / "task.yaml", prompt=raw["prompt"].rstrip(), labels=labels)
    task = load_task(path)
    return {
        "task": path,
        "rows": _write(folder / "rows.jsonl", [dict(row) for row in rows]),
        "ordered": _write(folder / "ordered.jsonl", map(_scored, task.render_all(rows))),
    }


def _scored(shown: Rendered) -> dict[str, Any]:
    return {"prompt": shown.prompt, "candidates": list(shown.candidates), "label": shown.label}


_LETTERS_A_TOKEN = 2.9  # of GSM8K's text under SmolLM2's tokenizer, which writes numbers by digits


def _long_files(
    data: str | None, num_tokens: int, num_rows: int, batch_size: int, folder: Path
) -> dict[str, str]:
    """Rows of some `num_tokens` tokens: questions and answers of GSM8K one after another, the first
    question as the prompt."""
    task = load_task(task_file("gsm8k"))
    shown = task.render_all(read_split(CellData(task="gsm8k", dir=data), "train"))
    random.Random(SEED).shuffle(shown)
    pairs = []
    for _ in range(num_rows):
        prompt, completion = shown[-1].prompt, shown.pop().completion
        while len(prompt) + len(completion) < num_tokens * _LETTERS_A_TOKEN:
            completion += f"\n\n{shown[-1].prompt}{shown.pop().completion}"
        letters = int(num_tokens * _LETTERS_A_TOKEN) - len(prompt)
        pairs.append({"prompt": prompt, "completion": completion[:letters]})
    plain = {"candidates": [], "label": None}
    ordered = [pairs[i] | plain for i in _order(num_rows, batch_size)]
    return _both(folder, pairs, ordered)


def _chat_files(data: str | None, num_rows: int, batch_size: int, folder: Path) -> dict[str, str]:
    source = f"{data}/alpaca_demo/train.jsonl" if data else "llamafactory/alpaca_en"
    rows = random.Random(SEED).sample(list(find_source(source)), num_rows)
    chats = []
    for row in rows:
        asked = "\n".join(filter(None, (row["instruction"], row["input"])))
        chats.append(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        )
    turns = [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]
    ordered = [turns[i] for i in _order(num_rows, batch_size)]
    return _both(folder, [{"messages": chat} for chat in chats], ordered)


_LETTERS_OF_A_PAIR = 1600  # at most, of the prompt and the longer answer: 400 tokens or so


def _preference_files(
    data: str | None, num_rows: int, batch_size: int, folder: Path
) -> dict[str, str]:
    """LLaMA-Factory's demonstration of preferences, those of one turn, as texts."""
    source = f"{data}/preferences/dpo_en_demo.json" if data else "llamafactory/DPO-En-Zh-20k:en"
    pairs = [
        {
            "prompt": f"Question: {row['conversations'][0]['value']}\nAnswer:",
            "chosen": f" {row['chosen']['value']}",
            "rejected": f" {row['rejected']['value']}",
        }
        for row in find_source(source)
        if len(row["conversations"]) == 1
    ]
    answers = ("chosen", "rejected")
    pairs = [
        pair
        for pair in pairs
        if len(pair["prompt"]) + max(len(pair[key]) for key in answers) <= _LETTERS_OF_A_PAIR
    ][:num_rows]
    return _both(folder, pairs, [pairs[i] for i in _order(num_rows, batch_size)])


def _raw_task(name: str) -> dict[str, Any]:
    return yaml.safe_load(task_file(name).read_text("utf-8"))


def _task_file(name: str, path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(_raw_task(name) | changes, sort_keys=False), encoding="utf-8")
    return str(path)


def _both(folder: Path, rows: list[Any], ordered: list[Any]) -> dict[str, str]:
    """Write rows as ours reads them, and as the peers do."""
    return {
        "rows": _write(folder / "rows.jsonl", rows),
        "ordered": _write(folder / "ordered.jsonl", ordered),
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
