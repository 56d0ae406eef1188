"""`compare`: methods against each other on a user's own config and data."""

from __future__ import annotations

import sys

import pytest
from conftest import write_rows

from chainlora.config.reading import make_config
from chainlora.errors import ConfigError
from chainlora_lab import compare, comparison, expand, read_results, run_cells
from chainlora_lab.cli import _fewest_seeds
from chainlora_lab.planning import undecidable


def test_compare_on_a_user_s_own_files(tiny_folder, tmp_path):
    pairs = [{"prompt": f"{word} is", "completion": f" {word}"} for word in ("one", "two", "three")]
    rows = write_rows(tmp_path / "mine.jsonl", pairs)
    config = make_config(
        {
            "model": str(tiny_folder),
            "data": {"train": [{"path": str(rows)}], "validation": 1},
            "chain": {"ranks": [2, 2], "steps": [2, 1], "target_modules": ["q_proj"]},
            "train": {"batch_size": 2},
        }
    )
    report = compare(config, ["lora", "chain2"], [0, 1], tmp_path / "out", backend="inline")
    assert [(s.method, s.metric, s.split) for s in report.summaries] == [
        ("lora", "loss", "validation"),
        ("chain2", "loss", "validation"),
    ]
    assert "No hyper-parameter was tuned" in report.markdown
    assert comparison(config, ["lora", "chain2"], [0]).base["recipe"] == {"rank": 2, "steps": 3}
    with pytest.raises(ConfigError, match=r"chosen on validation rows.*got no data\.test"):
        comparison(config, ["lora"], [0], learning_rates=[1e-3])


def test_a_method_is_what_its_preset_says_whatever_the_config_sets(configure):
    """Under `knots: auto`, `lora` and `soft` were one cell, and LoRA of rank 4r had soft knots."""
    chain = {"ranks": [2], "steps": [3], "knots": "auto", "dropout": 0.1}
    keys = {"lora_plus_ratio": 4, "keep_best": True, "schedule": "cosine"}
    methods = ["lora", "soft", "lora_plus", "relora"]
    experiment = comparison(configure(None, chain=chain, train=keys), methods, [0])
    assert "left out: chain.knots, train.keep_best, train.lora_plus_ratio." in (
        experiment.description
    )
    configs = [cell.config for cell in expand(experiment)]
    found = [(c.chain.knots is not None, c.train.lora_plus_ratio) for c in configs]
    assert found == [(False, 1), (True, 1), (False, 16), (False, 1)]
    shared = {(c.train.keep_best, c.train.schedule, c.chain.dropout) for c in configs}
    assert shared == {(False, "cosine", 0.1)}


def test_methods_on_pairs_are_compared_by_accuracy(tiny_folder, tmp_path):
    """Losses of DPO with another beta, or of ORPO, have another scale."""
    pairs = [{"prompt": f"the {n}", "chosen": " yes", "rejected": " no"} for n in range(6)]
    rows = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    tree = {"model": str(tiny_folder), "data": {"train": rows, "validation": rows}}
    tree |= {"chain": {"ranks": [2], "steps": [2]}, "train": {"loss": "dpo"}}
    methods = {"lora": {}, "orpo": {"train": {"loss": "orpo"}}}
    report = compare(make_config(tree), methods, [0], tmp_path / "out", backend="inline")
    cells = read_results(tmp_path / "out").finals
    assert {cell["metric"] for cell in cells} == {"accuracy"}
    assert [s.method for s in report.summaries] == ["lora", "orpo"]
    assert "differences in score" in report.markdown
    assert "differences in held-out loss" not in report.markdown


@pytest.mark.parametrize("num_methods", [2, 4, 6])
def test_the_seeds_of_a_comparison_can_decide_by_default(num_methods, configure):
    """Six for any number of methods were called too few by the report itself."""
    config = configure(None, chain={"ranks": [2], "steps": [3]})
    methods = ["lora", "lora_wide", "chain2", "chain3", "soft", "relora"][:num_methods]
    seeds, why = _fewest_seeds(num_methods - 1)
    assert why.startswith(f"{seeds} seeds: the fewest with which the exact test of ")
    assert undecidable(comparison(config, methods, range(seeds))) is None
    assert undecidable(comparison(config, methods, range(seeds - 1))) is not None


def test_without_scipy_compare_stops_before_it_runs_and_an_experiment_runs(
    small, base, configure, tmp_path, monkeypatch
):
    """The report needs it; cells do not."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    base["recipe"]["steps"] = 2
    config = configure(None, chain={"ranks": [2], "steps": [2]})
    with pytest.raises(ConfigError, match=r"pip install 'chainlora\[experiments\]'"):
        compare(config, ["lora", "chain2"], [0], tmp_path / "out", backend="inline")
    assert not (tmp_path / "out").exists()
    plans = []
    for _ in range(2):  # the second time there are results, whose spread cannot be judged
        experiment = small(base=base, methods=["lora", "chain2"], seeds=[0, 1], tune={})
        done = run_cells(experiment, tmp_path / "out", backend="inline", listener=plans.append)
        assert not done.failed
    notes = [note for plan in plans if plan["event"] == "plan" for note in plan["notes"]]
    assert any("need scipy" in note for note in notes)


@pytest.mark.parametrize("key", ["start", "data.replay"])
def test_keys_of_earlier_work_are_refused_before_any_cell(tmp_path, key):
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}] * 4))
    data = {"train": rows, "test": rows} | ({"replay": 0.5} if key == "data.replay" else {})
    own = {"start": "runs/other"} if key == "start" else {}
    config = {"model": "m", "data": data, "chain": {"ranks": [2], "steps": [1]}} | own
    with pytest.raises(ConfigError, match=rf"trains from the bare base \(got {key}\)"):
        comparison(make_config(config), ["lora", "chain2"], range(6))
