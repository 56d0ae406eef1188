"""What a run costs: operations, tokens and parameters, as counted and as recorded."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_model
from experiment_cases import tree
from torch.utils.flop_counter import FlopCounterMode

from chainlora.experiments import make_experiment, read_results, run_cells
from chainlora.experiments.execution.flops import paper_flops, training_flops
from chainlora.experiments.execution.shapes import shapes_of


def test_a_gradient_start_is_paid_for(tiny_folder, sentiment, tmp_path):
    """Its sweeps read batches that no step counts: three a link, over `init_batches` batches
    each."""
    base = tree(tiny_folder, sentiment)["base"]
    base["chain"]["init_batches"] = 2
    experiment = make_experiment(
        tree(tiny_folder, sentiment, base=base, methods=["chain3", "chain3_fw"], seeds=[0], tune={})
    )
    run_cells(experiment, tmp_path, backend="inline")
    plain, directed = read_results(tmp_path).finals
    assert plain["start_tokens"] == 0
    assert directed["start_tokens"] == directed["tokens"] - plain["tokens"] > 0
    records = [
        json.loads(line)
        for line in next(tmp_path.glob(f"cells/{directed['cell']}/run/metrics.jsonl")).open()
    ]
    steps = [record["tokens"] for record in records if record["event"] == "step"]
    assert directed["start_tokens"] == 3 * sum(
        steps
    )  # links of two steps: each reads its own batches three times
    # attention's share differs a little between batches; the tokens' own share is exact
    assert directed["flops"] / plain["flops"] == pytest.approx(
        directed["tokens"] / plain["tokens"], rel=0.01
    )


def test_parameters_trained_are_those_of_the_run(tiny_folder, sentiment, tmp_path):
    experiment = make_experiment(
        tree(tiny_folder, sentiment, methods=["lora", "dora"], seeds=[0], tune={})
    )
    run_cells(experiment, tmp_path, backend="inline")
    lora, dora = (cell["trainable_parameters"] for cell in read_results(tmp_path).finals)
    config = tiny_model("llama").config
    size = config.hidden_size // config.num_attention_heads
    outputs = config.hidden_size + config.num_key_value_heads * size
    assert (
        dora - lora == config.num_hidden_layers * outputs
    )  # a magnitude for each output of q and v


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ("k_proj", "down_proj")),
        ("llama", ("gate_proj",)),
        ("llama", ("layers.1.mlp.down_proj",)),
        ("opt", ("q_proj", "v_proj")),
        ("opt", ("out_proj", "fc2")),
        ("gpt2", ("c_attn",)),
        ("gpt2", ("mlp.c_proj",)),
    ],
)
def test_counted_operations_are_torch_s_own_count(architecture, targets):
    from chainlora.chain.adapters import attach
    from chainlora.config.schema import LinkConfig

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
    ours = (
        length * training_flops(shapes, 4, context=length) + length * 2 * head
    )  # forward, input's gradient
    assert ours == counter.get_total_flops()


def test_the_paper_s_rule_gives_its_table_3():
    parameters = 48 * 2 * (2048 + 2048)  # OPT-1.3B, q and v of 24 layers, two ranks given up
    assert paper_flops([parameters], [152_588]) == pytest.approx(
        3.60e11, rel=1e-3
    )  # as printed, three digits
    assert paper_flops([1, 2], [10, 20]) == 6 * (10 + 40)
