"""The lab's texts: a token stream cut into blocks, and who trains on which.

The first blocks of a fixed shuffle are held out: 200 to choose learning rates on, 200 for results.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT = 200  # blocks, for tuning and for results each
_MAX_CHARACTERS = 8_000_000


class Text(NamedTuple):
    """Blocks [n, length + 1] of one text."""

    train: Tensor
    tuning: Tensor
    results: Tensor


def load_text(name: str, tokenizer, length: int, data: Path | None) -> Text:
    """Return the blocks of `gsm8k` (questions and answers) or `python` (standard library)."""
    documents = {"gsm8k": _gsm8k, "python": _standard_library}[name](data)
    stream: list[int] = []
    for encoded in tokenizer.encode_batch(documents, add_special_tokens=False):
        stream += [tokenizer.separator, *encoded.ids]
    count = len(stream) // (length + 1)
    blocks = torch.tensor(stream[: count * (length + 1)]).view(count, length + 1)
    blocks = blocks[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return Text(blocks[2 * HELD_OUT :], blocks[:HELD_OUT], blocks[HELD_OUT : 2 * HELD_OUT])


def batches(train: Tensor, rows: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of `rows` blocks, epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < rows:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        yield train[order[:rows]]
        order = order[rows:]


def _gsm8k(data: Path | None) -> list[str]:
    if data is None:
        raise SystemExit("text gsm8k needs the data folder; set CHAINLORA_TEST_DATA to it")
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"{row['question']}\n{row['answer']}\n" for row in map(json.loads, lines)]


def _standard_library(data: Path | None) -> list[str]:
    """Return the modules at the top of the standard library, in order of name, up to a length."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        found.append(source)
        size += len(source)
        if size > _MAX_CHARACTERS:
            break
    return found
