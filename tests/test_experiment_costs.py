"""What a run costs: tokens and parameters, as recorded."""

from __future__ import annotations

import json

from conftest import tiny_model
from experiment_cases import tree

from chainlora.experiments import make_experiment, read_results, run_cells


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
    assert sum(directed["link_tokens"]) == directed["tokens"]


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
