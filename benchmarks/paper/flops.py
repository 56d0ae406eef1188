"""Floating-point operations of a run: counted from its matmuls' shapes, and by the paper's 6·N·D.

Counted: a multiply-add is two operations; a frozen weight costs its forward (2·in·out a token) and
the gradient of its input (as much again) but no weight gradient; a LoRA factor costs all three.
Below the first adapted layer nothing flows back. Attention costs 4·context·width a token forward
and twice that backward. Element-wise work, norms and the optimizer are left out (a percent or so).
The output head is counted at the positions scored.

The paper's rule: 6·N·D with N the parameters *trained* and D the tokens. Read so from its Table 3,
where the savings are proportional to the rank given up and 3.6e11 is 6 × 393,216 (two ranks over 48
modules of 2048 × 2048) × 152,588 tokens (derived; the paper does not say what N is).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from chainlora.config.schema import RunConfig
from chainlora.models.finding import resolve_model
from chainlora_lab.loops import CellConfig
from chainlora_lab.protocol import load_task

_ROLES = {"q_proj": "q", "query": "q", "k_proj": "k", "key": "k", "v_proj": "v", "value": "v"}
_FROM_BLOCK_INPUT = {*_ROLES, "qkv_proj", "c_attn", "query_key_value", "Wqkv"}
_INTO_MLP = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h"}
_OUT_OF_MLP = {"down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"}


@dataclass(frozen=True)
class Matmul:
    """A weight that multiplies every token; `block` is its transformer block, -1 before all."""

    name: str
    num_in: int
    num_out: int
    block: int
    adapted: bool = False


@dataclass(frozen=True)
class Shapes:
    """The matmuls of a model. `attention_width` is heads × head size, summed over blocks."""

    matmuls: tuple[Matmul, ...]
    head_in: int
    head_out: int
    attention_width: int
    num_parameters: int


def lora_parameters(shapes: Shapes, rank: int) -> int:
    """Return the parameters of one link of `rank` over the adapted matmuls."""
    return sum(rank * (m.num_in + m.num_out) for m in shapes.matmuls if m.adapted)


def forward_flops(shapes: Shapes, context: float) -> float:
    """Return the operations of one token's forward over `context` positions, without the head."""
    return (
        2 * sum(m.num_in * m.num_out for m in shapes.matmuls) + 4 * context * shapes.attention_width
    )


def training_flops(shapes: Shapes, rank: int, context: float, *, full: bool = False) -> float:
    """Return the operations of one token's forward and backward, without the head.

    `context` is the mean number of positions a token attends to; `full`: every weight is trained.
    """
    total = forward_flops(shapes, context)
    if full:
        first = min(m.block for m in shapes.matmuls), 0
        weights = sum(2.0 * m.num_in * m.num_out for m in shapes.matmuls)
    else:
        adapted = [m for m in shapes.matmuls if m.adapted]
        first = min(((m.block, _stage(m)) for m in adapted), default=(0, 0))
        weights = sum(_lora_flops(m, rank, flows=_needs_input_gradient(m, first)) for m in adapted)
    inputs = sum(
        2 * m.num_in * m.num_out for m in shapes.matmuls if _needs_input_gradient(m, first)
    )
    return total + weights + inputs + _attention_backward(shapes, first[0], context, full)


def _attention_backward(shapes: Shapes, first: int, context: float, full: bool) -> float:
    """Gradients of queries, keys, values and weights, from the first adapted block upwards."""
    blocks = sorted({m.block for m in shapes.matmuls if m.block >= 0})
    one = 2 * context * shapes.attention_width / len(blocks)
    above = 4 * one * sum(block > first for block in blocks)
    roles = set[str]()
    for m in shapes.matmuls:
        if m.block == first and (m.adapted or full):
            name = m.name.rpartition(".")[2]
            roles |= {*_ROLES.get(name, "qkv" if name in _FROM_BLOCK_INPUT else "")}
    # the attention weights' gradient leads to queries and keys
    here = len(roles) + bool(roles & {"q", "k"})
    return above + here * one


def _stage(matmul: Matmul) -> int:
    """Return a matmul's place in its block: 0 input, 1 attention's output, 2 and 3 the MLP's.

    A name that is not known is taken for attention's output.
    """
    path = matmul.name.split(".")
    for stage, names in ((0, _FROM_BLOCK_INPUT), (2, _INTO_MLP), (3, _OUT_OF_MLP)):
        if path[-1] in names or ".".join(path[-2:]) in names:
            return stage
    return 1


def _needs_input_gradient(matmul: Matmul, first: tuple[int, int]) -> bool:
    """Return whether anything before it is trained, from block and stage of the `first` that is."""
    return (matmul.block, _stage(matmul)) > first


def _lora_flops(matmul: Matmul, rank: int, *, flows: bool) -> float:
    """Forward through both factors, their gradients, gradients on the way down."""
    a, b = 2 * rank * matmul.num_in, 2 * rank * matmul.num_out
    # A's own gradient needs the one through B
    return 2 * (a + b) + b + (a if flows else 0)


def head_flops(shapes: Shapes, *, trained: bool = False) -> float:
    """Return the operations of one scored position through the output head, both ways."""
    return (6 if trained else 4) * shapes.head_in * shapes.head_out


def paper_flops(num_trained: Sequence[int], num_tokens: Sequence[float]) -> float:
    """Return 6·N·D summed over links: N parameters trained, D tokens seen."""
    return 6.0 * sum(n * d for n, d in zip(num_trained, num_tokens, strict=True))


# --- the matmuls of a model, from its config alone: built on the meta device, without weights ---

_BLOCK = re.compile(r"\.(\d+)\.")
_LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_A\b")


def adapted_modules(run: Path) -> frozenset[str]:
    """Return the names of the modules that the links of a run adapt."""
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
    matmuls = [
        replace(m, block=blocks) if m.block < 0 and f".{m.name}".endswith(".project_out") else m
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


# --- a cell's operations, from its line of results ---


def cell_costs(cell: Mapping[str, Any], run: Path) -> dict[str, float]:
    """Return a cell's operations: `flops`, counted, and `flops_6nd`, by the paper's rule.

    Lines written before 0.3 hold both. Those of today are counted from what they hold and from
    `run`, the cell's run directory, which names the modules that its links adapt.

    Raises FileNotFoundError without that directory.
    """
    if "flops" in cell:
        return {key: float(cell[key]) for key in ("flops", "flops_6nd")}
    if not cell["steps"]:
        return {"flops": 0.0, "flops_6nd": 0.0}
    config = CellConfig(**cell["config"])
    full = config.loop == "full"
    adapted = adapted_modules(run)
    if not adapted and not full:
        raise FileNotFoundError(f"a cell's links say which modules they adapt (got none in {run})")
    shapes = model_shapes(config.model, adapted)
    ranks, tokens = config.chain.ranks, cell["link_tokens"]
    in_steps = cell["tokens"] - cell["start_tokens"]
    rows = cell["steps"] * config.train.batch_size * config.train.gradient_accumulation
    context = in_steps / rows / 2  # what a token attends to under a causal mask, on average
    per_token = [training_flops(shapes, rank, context, full=full) for rank in ranks]
    flops = sum(n * each for n, each in zip(tokens, per_token, strict=True))
    # what a gradient start reads costs what as many tokens cost in training
    scored = _scored_positions(config, cell, in_steps) * cell["tokens"] / in_steps
    flops += scored * head_flops(shapes, trained=full)
    # what ranks do not tell (biases) every link has alike
    counted = cell["trainable_parameters"]
    trained = [counted if full else lora_parameters(shapes, rank) for rank in ranks]
    trained = [n + counted - max(trained) for n in trained]
    return {"flops": flops, "flops_6nd": paper_flops(trained, tokens)}


def _scored_positions(config: RunConfig, cell: Mapping[str, Any], in_steps: int) -> float:
    """Return the positions that go through the whole output head.

    None where only label rows of it are needed; the run's own count where it gives one, else every
    token of a completion task (an upper bound).
    """
    if config.data.task is not None and load_task(config.data.task).loss == "candidates":
        return 0
    return float(cell.get("scored_tokens") or in_steps)
