"""What a finished run cost and reached: from its run directory to the fields of a cell's result.

The one file here that builds a model: on the meta device, without weights, for the shapes of its
matmuls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from chainlora.config.schema import RunConfig
from chainlora.data.tasks import load_task
from chainlora.experiments.execution.flops import (
    Matmul,
    Shapes,
    head_flops,
    lora_parameters,
    paper_flops,
    training_flops,
)
from chainlora.experiments.execution.records import FORMAT
from chainlora.models.loading import resolve_model

_BLOCK = re.compile(r"\.(\d+)\.")
_LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_A\b")


def summarise(config: RunConfig, result: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the fields of a cell (see `records.py`) from what `train` returned and wrote to
    `run`."""
    records = read_metrics(run)
    steps = [record for record in records if record["event"] == "step"]
    start_tokens = _by_link([record for record in records if record["event"] == "gradient"], config)
    metrics = result["metrics"]
    split = "test" if "test" in metrics else "validation"
    metric = task_metric(config)
    best = result.get("best")
    return {
        "format": FORMAT,
        "status": "done",
        "metric": metric,
        "score_split": split,
        "score": metrics.get(split, {}).get(metric),
        "validation": metrics.get("validation"),
        "test": metrics.get("test"),
        "validation_best": None if best is None else best["value"],
        "majority": metrics.get(split, {}).get("majority"),
        "train_loss": last_loss(steps),
        "steps": result["steps"],
        "tokens": result["tokens"] + sum(start_tokens),
        "start_tokens": sum(start_tokens),
        "rows": result.get("rows"),
        **_costs(config, result, run, steps, start_tokens),
        "wall_s": result["wall_s"],
        "peak_rss_mb": result["peak_memory_mb"],
        "ranks": list(config.chain.ranks),
        "link_steps": _link_steps(steps, len(config.chain.ranks)),
        "link_scores": [
            record.get(metric)
            for record in records
            if record["event"] == "eval" and record.get("where") == "knot"
        ],
        "config": compact_config(config),
        "rows_digest": result["rows_digest"],
        "base_fingerprint": result["base_fingerprint"][:12],
        "versions": result["versions"],
        "hardware": result["hardware"],
    }


def diverged(config: RunConfig, message: str) -> dict[str, Any]:
    """Return the fields of a cell whose loss stopped being finite: a result while rates are
    chosen."""
    return {
        "format": FORMAT,
        "status": "diverged",
        "metric": task_metric(config),
        "message": message,
        "ranks": list(config.chain.ranks),
        "config": compact_config(config),
    }


def compact_config(config: RunConfig) -> dict[str, Any]:
    """Return the config's values other than the defaults, without the places of this machine."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree.pop("output", None)
    tree["data"].pop("dir", None)
    return tree


def task_metric(config: RunConfig) -> str:
    """Return the metric a run is judged by: the task's own, the loss for a user's files."""
    return load_task(config.data.task).metric if config.data.task is not None else "loss"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read a run's ``metrics.jsonl``; none if it has none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def last_loss(steps: list[dict[str, Any]]) -> float | None:
    """Return the mean training loss over the last tenth of the steps; None if there were none."""
    tail = steps[-max(1, len(steps) // 10) :]
    return sum(step["loss"] for step in tail) / len(tail) if tail else None


def _link_steps(steps: list[dict[str, Any]], num_links: int) -> list[int]:
    return [sum(step["link"] == link for step in steps) for link in range(num_links)]


def _costs(
    config: RunConfig,
    result: Mapping[str, Any],
    run: Path,
    steps: list[dict[str, Any]],
    start_tokens: Sequence[int],
) -> dict[str, Any]:
    """Return parameters trained and operations, counted and by the paper's rule; zeros without
    training.

    What a gradient start reads costs what as many tokens cost in training.
    """
    if not steps:
        return {"trainable_parameters": 0, "flops": 0.0, "flops_6nd": 0.0}
    shapes = model_shapes(config.model, adapted_modules(run))
    full = config.chain.tune == "full"
    tokens = [float(a + b) for a, b in zip(_by_link(steps, config), start_tokens, strict=True)]
    context = _mean_context(config, steps)
    factors = config.chain.train_factors
    per_token = [
        training_flops(shapes, rank, context, factors=factors, tune=config.chain.tune)
        for rank in config.chain.ranks
    ]
    flops = sum(n * each for n, each in zip(tokens, per_token, strict=True))
    scored = _scored_positions(config, result, steps) * (1 + sum(start_tokens) / result["tokens"])
    flops += scored * head_flops(shapes, trained=full)
    counted = result[
        "trainable_parameters"
    ]  # what ranks do not tell (DoRA's magnitudes, biases) every link has alike
    trained = [counted if full else _trained(shapes, rank, factors) for rank in config.chain.ranks]
    trained = [n + counted - max(trained) for n in trained]
    return {
        "trainable_parameters": counted,
        "flops": flops,
        "flops_6nd": paper_flops(trained, tokens),
    }


def _by_link(records: Iterable[Mapping[str, Any]], config: RunConfig) -> list[int]:
    """Sum the tokens of records by link."""
    tokens = [0] * len(config.chain.ranks)
    for record in records:
        tokens[record["link"]] += record["tokens"]
    return tokens


def _trained(shapes: Shapes, rank: int, factors: str) -> int:
    if factors == "both":
        return lora_parameters(shapes, rank)
    return sum(
        rank * (m.num_in if factors == "A" else m.num_out) for m in shapes.matmuls if m.adapted
    )


def _mean_context(config: RunConfig, steps: list[dict[str, Any]]) -> float:
    """Half the mean sequence: what a token attends to under a causal mask, on average."""
    rows = len(steps) * config.train.batch_size * config.train.gradient_accumulation
    return sum(step["tokens"] for step in steps) / rows / 2


def _scored_positions(
    config: RunConfig, result: Mapping[str, Any], steps: list[dict[str, Any]]
) -> float:
    """Positions that go through the whole output head: none where only label rows of it are needed;
    the run's own count where it gives one, else every token of a completion task (an upper
    bound)."""
    if config.data.task is not None and load_task(config.data.task).loss == "candidates":
        return 0
    return float(result.get("scored_tokens") or sum(step["tokens"] for step in steps))


def adapted_modules(run: Path) -> frozenset[str]:
    """Return the names of the modules that the first link of a run adapts."""
    files = sorted((run / "links").glob("*/adapter_model.safetensors"))
    if not files:
        return frozenset()
    with safe_open(files[0], framework="pt") as file:
        return frozenset(match[1] for match in map(_LORA_KEY.match, file.keys()) if match)


def model_shapes(model: str, adapted: Iterable[str]) -> Shapes:
    """Return the matmuls of a model, from its config alone."""
    config = AutoConfig.from_pretrained(str(resolve_model(model) or model))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    return shapes_of(built, adapted)


def shapes_of(model: Any, adapted: Iterable[str]) -> Shapes:
    """Return the matmuls of a built model; `adapted` names modules."""
    adapted, head = frozenset(adapted), model.get_output_embeddings()
    matmuls = [
        Matmul(name, *_in_out(module), block=_block(name), adapted=name in adapted)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    blocks = 1 + max(matmul.block for matmul in matmuls)
    after = [
        m.name for m in matmuls if m.block < 0 and m.name.rpartition(".")[2] in ("project_out",)
    ]
    matmuls = [
        m if m.name not in after else Matmul(m.name, m.num_in, m.num_out, blocks, m.adapted)
        for m in matmuls
    ]
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    num_in, num_out = _in_out(head)
    return Shapes(
        tuple(matmuls),
        num_in,
        num_out,
        width * text.num_hidden_layers,
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _in_out(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _block(name: str) -> int:
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1
