"""What several test modules use: configs of tiny runs, and how to compare runs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def settings(tiny_folder, sentiment, output=None, **sections) -> dict:
    tree = {
        "model": str(tiny_folder),
        "data": {
            "task": str(sentiment / "task.yaml"),
            "train": str(sentiment / "train.jsonl"),
            "validation": str(sentiment / "validation.jsonl"),
        },
        "chain": {
            "ranks": [4, 4, 2],
            "alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "steps": [4, 4, 3],
        },
        "train": {"lr": 1e-2, "batch_size": 8},
        "output": None if output is None else str(output),
    }
    for section, keys in sections.items():
        if isinstance(keys, dict):
            tree[section] = tree[section] | keys
            tree[section] = {
                key: value for key, value in tree[section].items() if value is not None
            }
        else:
            tree[section] = keys
    return tree


def links_of(run: Path) -> list[dict[str, torch.Tensor]]:
    return [
        load_file(folder / "adapter_model.safetensors")
        for folder in sorted((run / "links").iterdir())
    ]


def assert_same_links(one: Path, two: Path) -> None:
    first, second = links_of(one), links_of(two)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
