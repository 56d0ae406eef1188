"""benchmarks/paper: operations as they are counted, and the paper's numbers beside ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from chainlora.chain.adapters import attach
from chainlora.config.schema import LinkConfig
from chainlora.errors import ConfigError
from lab.cases import change

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/paper"))
from flops import shapes_of, training_flops
from report import report


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ("k_proj", "down_proj")),
        ("opt", ("out_proj", "fc2")),
        ("gpt2", ("c_attn",)),
    ],
)
def test_counted_operations_are_torch_s_own_count(architecture, targets):
    model, length = tiny_model(architecture, attn_implementation="eager"), 24
    names = [
        name
        for name, _ in model.named_modules()
        if any(f".{name}".endswith(f".{each}") for each in targets)
    ]
    shapes = shapes_of(model, names)
    attach(model, LinkConfig(rank=4, alpha=4, target_modules=targets))
    ids = torch.arange(2, 2 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids).logits[0, -1].sum().backward()
    head = 2 * shapes.head_in * shapes.head_out
    # eager attention multiplies the whole square: a context of `length`
    # forward, input's gradient
    ours = length * training_flops(shapes, 4, context=length) + length * 2 * head
    assert ours == counter.get_total_flops()


def with_cost(cell):
    return cell | {"flops": 1e9, "flops_6nd": 1e6}


def test_the_paper_s_numbers_and_figures_stand_beside_ours(tmp_path):
    figures = ["scores", "chain_length", "rank_step_down"]
    path = change(tmp_path / "results.jsonl", with_cost, paper="table4", figures=figures)
    made = report(path)
    assert "| paper: lora (OPT-1.3B) | 56.53 ± 7.67 | 75.35 ± 4.84 |" in made.markdown
    assert "| wsc chain3 | 1.00e+09 | 1.00e+06 |" in made.markdown
    assert {"chain_length.png", "rank_step_down.svg"} <= {file.name for file in made.files}
    assert "Score by the number of links: wsc" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"`paper` must be one of table1, .*'table9'"):
        report(change(path, with_cost, paper="table9"))
