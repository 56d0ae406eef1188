"""What a run costs: tokens and parameters, as recorded."""

from __future__ import annotations

from experiment_cases import tree
from helpers import records_of

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
    records = records_of(tmp_path / "cells" / directed["cell"] / "run")
    steps = [record["tokens"] for record in records if record["event"] == "step"]
    # links of two steps: each reads its own batches three times
    assert directed["start_tokens"] == 3 * sum(steps)
    assert sum(directed["link_tokens"]) == directed["tokens"]
