"""Experiments that tests share: a small one that is run, and results made up without a model."""

from __future__ import annotations

import hashlib
import itertools
import json

from conftest import write_rows


def tree(tiny_folder, sentiment, **keys):
    """A small experiment: two methods, two rates, two seeds, on rows that are learnt in a few
    steps."""
    return {
        "name": "small",
        "base": {
            "model": str(tiny_folder),
            "recipe": {"rank": 2, "steps": 6, "scaling": 2},
            "data": {
                "train": str(sentiment / "train.jsonl"),
                "validation": str(sentiment / "validation.jsonl"),
                "test": str(sentiment / "validation.jsonl"),
            },
            "chain": {"target_modules": ["q_proj", "v_proj"]},
            "train": {"batch_size": 8},
        },
        "tasks": {"mood": {"data": {"task": str(sentiment / "task.yaml")}}},
        "methods": ["lora", "chain3"],
        "seeds": [0, 1],
        "tune": {"grid": {"train.lr": [1e-3, 1e-2]}},
    } | keys


def sequence(tiny_folder, folder, **keys):
    """A config of two small data sets, one after the other, with rows to score."""
    words = {"facts": ["cat", "mat", "red"], "style": ["hill", "fly", "saw"]}
    stages = []
    for (name, own), answer in zip(words.items(), (" yes", " no"), strict=True):
        rows = [{"prompt": f"the {a} {b}", "completion": answer} for a in own for b in own]
        held_out = [{"prompt": f"the {a} on", "completion": answer} for a in own]
        data = {
            "train": str(write_rows(folder / f"{name}.jsonl", rows)),
            "validation": str(write_rows(folder / f"{name}-held-out.jsonl", held_out)),
        }
        stages.append({"name": name, "data": data})
    return {
        "model": str(tiny_folder),
        "chain": {"ranks": [2], "steps": [4], "target_modules": ["q_proj", "v_proj"]},
        "train": {"batch_size": 4, "lr": 1e-2},
        "start_data": "none",
        "stages": stages,
    } | keys


def lines(**head):
    """Results without a model: two methods, six seeds, the chain always two points ahead."""
    first = {
        "format": 2,
        "kind": "experiment",
        "name": "made",
        "description": "Made up.",
        "model": "none",
        "tasks": ["wsc", "cb"],
        "methods": {"lora": "One.", "chain3": "Three.", "zero_shot": "None."},
        "pairs": [["chain3", "lora"]],
        "seeds": list(range(6)),
        "tuning_seeds": [0],
        "grid": {},
        "figures": ["scores", "differences"],
        "paper": None,
    } | head
    yield first
    for task, (method, ranks, ahead), seed in itertools.product(
        first["tasks"],
        (("lora", [8], 0.0), ("chain3", [8, 8, 8], 0.02), ("zero_shot", [], -0.1)),
        first["seeds"],
    ):
        if method == "zero_shot" and seed:
            continue
        score = 0.6 + 0.01 * seed + ahead + 0.001 * (seed % 2) * bool(ahead)
        yield {
            "format": 2,
            "kind": "cell",
            "cell": hashlib.sha256(f"{task}{method}{seed}".encode()).hexdigest()[:12],
            "phase": "final",
            "task": task,
            "method": method,
            "seed": seed,
            "point": {},
            "status": "done",
            "metric": "accuracy",
            "score_split": "test",
            "score": score,
            "test": {"accuracy": score, "loss": 0.5 - ahead},
            "validation": {"accuracy": score, "loss": 0.5},
            "majority": 0.635,
            "train_loss": 0.1,
            "steps": 10,
            "tokens": 1000,
            "rows": 8,
            "trainable_parameters": 64,
            "wall_s": 1.5,
            "peak_rss_mb": 100,
            "ranks": ranks,
            "link_steps": [],
            "curve": [],
            "config": {"chain": {"ranks": ranks, "steps": [10 // len(ranks)] * len(ranks)}}
            if ranks
            else {"chain": {"ranks": []}},
            "versions": {"python": "3"},
            "hardware": {"device": "cpu"},
        }


def write_lines(path, **head):
    return change(path, lambda line: line, **head)


def change(path, change_line, **head):
    """Write made results after a change of each line but the first; None leaves a line out."""
    first, *rest = lines(**head)
    kept = [first, *(new for line in rest if (new := change_line(line)) is not None)]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path


def with_curve(cell):
    """Losses that fall from 2, the chain's faster; zero-shot has none."""
    if not cell["ranks"]:
        return cell
    fall = 0.2 if cell["method"] == "chain3" else 0.1
    points = [
        {"step": step, "link": 0, "where": "step", "loss": 2.0 - fall * step + 0.01 * cell["seed"]}
        for step in range(0, 11, 2)
    ]
    return cell | {"curve": points, "link_steps": [4, 6] if cell["method"] == "chain3" else [10]}
