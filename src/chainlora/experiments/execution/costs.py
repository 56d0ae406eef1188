"""What a run cost: parameters trained and floating-point operations, counted from its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora.config.schema import RunConfig
from chainlora.data.tasks import load_task
from chainlora.experiments.execution.flops import (
    Shapes,
    head_flops,
    lora_parameters,
    paper_flops,
    training_flops,
)
from chainlora.experiments.execution.shapes import adapted_modules, model_shapes


def run_costs(
    config: RunConfig,
    result: Mapping[str, Any],
    run: Path,
    steps: list[dict[str, Any]],
    start_tokens: Sequence[int],
) -> dict[str, Any]:
    """Return parameters trained and operations, counted and by the paper's rule.

    All are zero without training. What a gradient start reads costs what as many tokens cost in
    training.
    """
    if not steps:
        return {"trainable_parameters": 0, "flops": 0.0, "flops_6nd": 0.0}
    shapes = model_shapes(config.model, adapted_modules(run))
    full = config.chain.tune == "full"
    tokens = [
        float(a + b) for a, b in zip(tokens_by_link(steps, config), start_tokens, strict=True)
    ]
    context = _mean_context(config, steps)
    factors = config.chain.train_factors
    per_token = [
        training_flops(shapes, rank, context, factors=factors, tune=config.chain.tune)
        for rank in config.chain.ranks
    ]
    flops = sum(n * each for n, each in zip(tokens, per_token, strict=True))
    scored = _scored_positions(config, result, steps) * (1 + sum(start_tokens) / result["tokens"])
    flops += scored * head_flops(shapes, trained=full)
    # what ranks do not tell (DoRA's magnitudes, biases) every link has alike
    counted = result["trainable_parameters"]
    trained = [counted if full else _trained(shapes, rank, factors) for rank in config.chain.ranks]
    trained = [n + counted - max(trained) for n in trained]
    return {
        "trainable_parameters": counted,
        "flops": flops,
        "flops_6nd": paper_flops(trained, tokens),
    }


def tokens_by_link(records: Iterable[Mapping[str, Any]], config: RunConfig) -> list[int]:
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
    """Positions that go through the whole output head.

    None where only label rows of it are needed; the run's own count where it gives one, else every
    token of a completion task (an upper bound).
    """
    if config.data.task is not None and load_task(config.data.task).loss == "candidates":
        return 0
    return float(result.get("scored_tokens") or sum(step["tokens"] for step in steps))
