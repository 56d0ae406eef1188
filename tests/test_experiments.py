"""Experiments: what is expanded, what survives, what is chosen, what statistics and report say."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from chainlora.config.loading import make_config
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.experiments import (
    compare,
    comparison,
    expand,
    load_experiment,
    make_experiment,
    read_results,
    report_experiment,
    run_cells,
    run_experiment,
)
from chainlora.experiments.design.choice import Trial, choose
from chainlora.experiments.design.expansion import config_id, expand_tuning
from chainlora.experiments.design.paper import paper_scores
from chainlora.experiments.design.power import undecidable
from chainlora.experiments.execution.flops import paper_flops, training_flops
from chainlora.experiments.execution.measure import shapes_of
from chainlora.experiments.execution.progress import time_left
from chainlora.experiments.execution.worker_pool import Room, worker_environment
from chainlora.experiments.report.statistics import (
    bootstrap_interval,
    compare_pairs,
    holm,
    judge,
    least_pairs,
    mean_sd,
    sign_flip_test,
)


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


@pytest.fixture(scope="module")
def done(tiny_folder, sentiment, tmp_path_factory):
    """The small experiment, run."""
    out = tmp_path_factory.mktemp("experiment")
    experiment = make_experiment(tree(tiny_folder, sentiment))
    return experiment, out, run_cells(experiment, out, backend="inline")


def test_results_of_another_folder_count_as_done(done, tiny_folder, sentiment, tmp_path):
    """More seeds can be added to results that were committed: only the new cells run."""
    _, out, outcome = done
    more = make_experiment(tree(tiny_folder, sentiment, seeds=[0, 1, 2]))
    plans = []
    grown = run_cells(
        more, tmp_path, backend="inline", reuse=[outcome.results], listener=plans.append
    )
    assert grown.num_run == 2  # one seed more of two methods
    assert [plan["later"] for plan in plans if plan["event"] == "plan"] == [
        2,
        0,
    ]  # what is told of the time left
    old, new = read_results(out), read_results(tmp_path)
    assert [cell for cell in new.cells if cell["seed"] < 2] == old.cells
    assert len(new.finals) == 6
    again = run_cells(
        more, tmp_path / "again", backend="inline", reuse=[tmp_path / "results.jsonl"]
    )
    assert again.num_run == 0
    assert (tmp_path / "again" / "results.jsonl").read_text() == (
        tmp_path / "results.jsonl"
    ).read_text()


# --- expansion
# -------------------------------------------------------------------------------------


def test_cells_are_task_by_method_by_grid_by_seed_with_stable_ids(tiny_folder, sentiment):
    experiment = make_experiment(
        tree(tiny_folder, sentiment, methods=["lora", "chain3", "zero_shot"])
    )
    tuning, everything = expand_tuning(experiment), expand(experiment)
    assert len(tuning) == 2 * 2  # two methods that train, two rates, the first seed
    assert (
        len(everything) == 2 * 2 * 2 + 1
    )  # what trains nothing needs neither rate nor second seed
    assert [cell.id for cell in everything] == [cell.id for cell in expand(experiment)]
    assert len({cell.id for cell in everything}) == len(everything)
    chain = next(cell for cell in everything if cell.method == "chain3")
    assert chain.config.chain.ranks == (2, 2, 2)
    assert chain.config.chain.steps == (2, 2, 2)
    assert chain.config.chain.alpha == 4
    moved = chain.config.model_copy(
        update={"output": "elsewhere", "data": chain.config.data.model_copy(update={"dir": "rows"})}
    )
    assert config_id(moved) == chain.id  # where things lie changes nothing
    assert (
        len(
            {
                config_id(
                    make_config(
                        {
                            "model": "m",
                            "data": {"task": "rte"},
                            "chain": {"ranks": []},
                            "train": {"seed": seed},
                        }
                    )
                )
                for seed in (0, 1)
            }
        )
        == 2
    )


def test_what_an_experiment_file_cannot_say(tiny_folder, sentiment, tmp_path):
    good = tree(tiny_folder, sentiment)
    for keys, words in (
        ({"method": []}, "unknown key `method`; did you mean 'methods'"),
        ({"methods": ["lorra"]}, "did you mean 'lora'"),
        (
            {"methods": {"lora": {"recipes": {}}}},
            r"unknown key `methods.lora.recipes`; did you mean 'recipe'",
        ),
        ({"baseline": "dora"}, "`baseline` must name methods of this file"),
        ({"seeds": [1, 1]}, "must differ"),
        ({"tune": {"grid": {"lr": [1]}}}, "config keys such as train.lr"),
        ({"tune": {"grid": {"train.lr": []}}}, "at least one value"),
        ({"figures": ["pie"]}, "figures"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            make_experiment(good | keys)
        assert "\n" not in str(error.value)
    for keys, words in (
        ({"tasks": ["rtee"]}, "did you mean 'rte'"),
        ({"base": good["base"] | {"train": {"lrr": 1}}}, "did you mean 'lr'"),
    ):
        with pytest.raises(ConfigError, match=words):
            expand(make_experiment(good | keys))
    with pytest.raises(ConfigError, match="must be readable"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(good))
    changed = load_experiment(tmp_path / "a.yaml", [("base.train.batch_size", "4")])
    assert changed.base["train"]["batch_size"] == 4


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_experiment_expands(path):
    experiment = load_experiment(path)
    cells = expand(experiment)
    assert {cell.task for cell in cells} == set(experiment.tasks)
    budgets = {cell.task: set() for cell in cells}
    for cell in cells:
        chain = cell.config.chain
        budgets[cell.task].add(sum(chain.epochs or chain.steps or ()))
    assert all(
        len(spent - {0}) == 1 for spent in budgets.values()
    )  # equal epochs or steps for all that train
    if experiment.paper:
        printed = set(paper_scores(experiment.paper))
        ours = set(experiment.methods)
        assert len(printed & ours) > 1 if path.stem.startswith("smol") else printed >= ours


# --- choice
# ----------------------------------------------------------------------------------------


def test_the_choice_is_by_validation_then_loss_then_order():
    def trial(rate, accuracy, loss, method="lora"):
        metrics = None if accuracy is None else {"accuracy": accuracy, "loss": loss}
        return Trial("t", method, (("train.lr", rate),), metrics, "accuracy")

    (record,) = choose(
        [trial(1, 0.5, 1.0), trial(2, 0.7, 0.9), trial(3, 0.7, 0.8), trial(4, 0.7, 0.8)]
    )
    assert record["chosen"] == {"train.lr": 3}
    (record,) = choose(
        [trial(1, 0.9, 1.0), trial(1, None, 0.0), trial(2, 0.1, 1.0), trial(2, 0.1, 1.0)]
    )
    assert record["chosen"] == {"train.lr": 2}  # a rate that diverges under one seed is not chosen
    (record,) = choose([trial(1, 0.9, 1.0), trial(2, 0.1, 0.5)], metric="loss")
    assert record["chosen"] == {"train.lr": 2}
    (record,) = choose([trial(1, None, 0.0)])
    assert record["chosen"] is None
    assert not any("test" in field for field in Trial.__dataclass_fields__)


# --- running
# ---------------------------------------------------------------------------------------


def test_a_run_tunes_chooses_and_gathers(done):
    _, _, outcome = done
    assert not outcome.failed
    results = read_results(outcome.results)
    assert len(results.finals) == 4
    assert len([cell for cell in results.cells if cell["phase"] == "tune"]) == 4
    for choice in results.choices:
        best = max(tried["mean"] for tried in choice["tried"])
        chosen = next(tried for tried in choice["tried"] if tried["point"] == choice["chosen"])
        assert chosen["mean"] == best
    cell = results.finals[0]
    assert cell["score"] == cell["test"]["accuracy"]
    assert cell["steps"] == sum(cell["link_steps"]) == 6
    assert cell["config"]["train"]["lr"] == cell["point"]["train.lr"]
    assert cell["flops"] > cell["flops_6nd"] > 0
    assert {"torch", "python"} <= cell["versions"].keys()
    assert (
        len({c["trainable_parameters"] for c in results.finals}) == 1
    )  # memory of one LoRA, chain or not


def test_what_is_done_is_not_done_again(done):
    experiment, out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}
    again = run_cells(experiment, out, backend="inline")
    assert again.num_run == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")} == before
    more = experiment.model_copy(update={"seeds": (0, 1, 2)})
    assert run_cells(more, out, backend="inline").num_run == 2  # one more seed, two methods
    run_cells(experiment, out, backend="inline")


def test_a_failed_cell_is_reported_and_the_others_go_on(tiny_folder, sentiment, tmp_path):
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "rte" / f"{split}.jsonl").write_text('{"premise": "It rains."}\n' * 2000)
    tasks = {
        "gone": {
            "data": {
                "task": "rte",
                "train": None,
                "validation": None,
                "test": None,
                "dir": str(tmp_path),
            }
        },
        "mood": {"data": {"task": str(sentiment / "task.yaml")}},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_folder, sentiment, tasks=tasks, tune={}, seeds=[0])))
    events = []
    with pytest.raises(
        RunError, match=r"got 2 of 4 failed, first gone lora seed=0: a row must have what `prompt`"
    ):
        run_experiment(path, tmp_path / "out", backend="inline", listener=events.append)
    results = read_results(tmp_path / "out")
    assert [cell["task"] for cell in results.finals] == ["mood", "mood"]
    ended = [event for event in events if event["event"] == "cell"]
    assert [event["error"] is None for event in ended] == [False, False, True, True]
    assert "gone lora: seeds 0" in report_experiment(tmp_path / "out", figures=False).markdown
    with pytest.raises(ConfigError, match="must be local, inline or ray"):
        run_experiment(path, tmp_path / "out", backend="slurm")


def test_rows_that_are_not_there_are_missed_before_anything_runs(tiny_folder, sentiment, tmp_path):
    data = {
        "task": "rte",
        "train": None,
        "validation": None,
        "test": None,
        "dir": str(tmp_path / "nowhere"),
    }
    tasks = {"rte": {"data": data}}
    with pytest.raises(
        DataError, match=r"'rte' needs its 'train' rows .*or leave the folder out to fetch"
    ):
        run_cells(
            make_experiment(tree(tiny_folder, sentiment, tasks=tasks)),
            tmp_path / "out",
            backend="inline",
        )
    assert not (tmp_path / "out").exists()


def test_results_without_their_cells_are_gone_on_with_and_none_is_lost(
    done, tiny_folder, sentiment, tmp_path
):
    """Committed results come without the cells behind them; so do cells that were once taken from
    elsewhere."""
    experiment, _, outcome = done
    (tmp_path / "results.jsonl").write_text(outcome.results.read_text())
    fewer = make_experiment(tree(tiny_folder, sentiment, methods=["lora"]))
    assert run_cells(fewer, tmp_path, backend="inline", max_cells=1).num_run == 0
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 0
    shutil.rmtree(
        next((tmp_path / "cells").iterdir())
    )  # as if killed while they were given folders
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 0
    assert (tmp_path / "results.jsonl").read_text() == outcome.results.read_text()
    taken = tmp_path / "taken"
    run_cells(experiment, taken, backend="inline", reuse=[outcome.results])
    assert run_cells(experiment, taken, backend="inline").num_run == 0


def test_cells_of_other_rows_or_weights_are_not_put_into_one_table(
    tiny_folder, sentiment, tmp_path
):
    folder = tmp_path / "rows" / "mood"
    shutil.copytree(sentiment, folder)
    data = {
        "task": str(sentiment / "task.yaml"),
        "train": None,
        "validation": None,
        "test": None,
        "dir": str(folder),
    }
    data |= {"num_validation": 10, "num_train": 20}
    one = make_experiment(
        tree(tiny_folder, sentiment, tasks={"mood": {"data": data}}, tune={}, methods=["lora"])
    )
    run_cells(one, tmp_path / "out", backend="inline")
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[::2]) + "\n")
    more = one.model_copy(update={"seeds": (0, 1, 2)})
    plans = []
    for to_run in ([["mood lora seed=2"]], []):  # once they are there, nothing more is computed
        with pytest.raises(
            RunError, match=r"must be of the same rows \(got \w+ in mood lora seed 0, .*new output"
        ):
            run_cells(more, tmp_path / "out", backend="inline", listener=plans.append)
        assert [plan["todo"] for plan in plans if plan["event"] == "plan"] == to_run
        plans.clear()
        more = more.model_copy(update={"seeds": (0, 1, 2, 3)})


def test_a_final_run_that_diverged_is_a_failure_however_often_it_is_asked_for(
    tiny_folder, sentiment, tmp_path
):
    wild = tree(tiny_folder, sentiment, methods=["lora"], tune={})
    wild["base"] = wild["base"] | {"train": {"batch_size": 8, "lr": 1e30, "max_grad_norm": None}}
    for num_run in (2, 0):
        outcome = run_cells(make_experiment(wild), tmp_path, backend="inline")
        assert outcome.num_run == num_run
        assert set(outcome.failed) == {"mood lora seed=0", "mood lora seed=1"}
    text = report_experiment(tmp_path, figures=False).markdown
    assert "**Diverged** (2)" in text
    assert "Not there yet" not in text


def test_what_so_few_seeds_cannot_decide_is_said_before_they_are_run(tiny_folder, sentiment):
    def note(seeds, **keys):
        return undecidable(
            make_experiment(tree(tiny_folder, sentiment, seeds=list(range(seeds)), **keys))
        )

    assert "5 seeds cannot decide anything" in note(5)
    assert note(6) is None  # 2 / 2^6 = 0.03
    three = {"methods": ["lora", "chain2", "chain3"]}
    assert "needs 7 for 5%" in note(6, **three)  # 2 · 2 / 2^6 = 0.0625
    assert note(7, **three) is None
    tasks = {name: {"data": {"task": str(sentiment / "task.yaml")}} for name in ("one", "other")}
    assert "cannot decide on any one task (over all of them together they may)" in note(
        6, tasks=tasks
    )


def test_a_list_of_names_keeps_what_the_file_says_of_them(tiny_folder, sentiment, tmp_path):
    own = {"lora": {"train": {"lr": 3e-4}}, "three": {"preset": "chain3"}, "pissa": None}
    path = tmp_path / "experiment.yaml"
    pairs = [["three", "lora"], ["pissa", "lora"]]
    path.write_text(yaml.safe_dump(tree(tiny_folder, sentiment, methods=own, comparisons=pairs)))
    few = load_experiment(path, [("methods", "[lora, three]")])
    assert few.methods == {"lora": {"train": {"lr": 3e-4}}, "three": {"preset": "chain3"}}
    assert few.pairs == (("three", "lora"),)
    other = load_experiment(path, [("methods", "[lora, dora]"), ("comparisons", "[[dora, lora]]")])
    assert (list(other.methods), other.pairs) == (["lora", "dora"], (("dora", "lora"),))
    with pytest.raises(
        ConfigError, match=r"must keep a pair that the file compares \(got \['three', 'pissa'\]\)"
    ):
        load_experiment(path, [("methods", "[three, pissa]")])
    with pytest.raises(ConfigError, match=r"unknown method 'chian3'.*'chain3'"):
        load_experiment(path, [("methods", "[lora, three, chian3]")])


def test_a_tuning_cell_that_failed_leaves_nothing_chosen(done, tiny_folder, sentiment, tmp_path):
    """One rate was never measured: a choice among the others would pass for a choice among all."""
    grid = {
        "data.num_validation": [4, 10**6],
        "data.shots": [0, 10**6],
    }  # so many demonstrations leave no rows
    experiment = make_experiment(
        tree(
            tiny_folder,
            sentiment,
            methods=["lora"],
            seeds=[0],
            tune={"grid": {"data.shots": grid["data.shots"]}},
        )
    )
    outcome = run_cells(experiment, tmp_path, backend="inline")
    assert len(outcome.failed) == 1
    results = read_results(tmp_path)
    assert results.choices == []
    assert "mood lora: seeds 0" in report_experiment(tmp_path, figures=False).markdown


def test_a_result_of_another_version_is_not_taken_for_one_of_this(tiny_folder, sentiment, tmp_path):
    experiment = make_experiment(tree(tiny_folder, sentiment, methods=["lora"], seeds=[0], tune={}))
    run_cells(experiment, tmp_path, backend="inline")
    (path,) = tmp_path.glob("cells/*/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(RunError, match=r"must be of format 1 \(got 0 in "):
        run_cells(experiment, tmp_path, backend="inline")


def test_what_cannot_be_chosen_or_scored_is_refused_before_anything_runs(
    tiny_folder, sentiment, tmp_path
):
    wrong = make_experiment(
        tree(tiny_folder, sentiment, tune={"grid": {"train.lr": [1e-3, 1e-2]}, "metric": "acuracy"})
    )
    with pytest.raises(
        ConfigError, match=r"`tune.metric` must be one of accuracy, loss \(got 'acuracy'\)"
    ):
        run_cells(wrong, tmp_path / "out", backend="inline")
    base = tree(tiny_folder, sentiment)["base"]
    base["data"] = {"train": base["data"]["train"]}
    with pytest.raises(ConfigError, match="compared on rows they do not train on"):
        run_cells(
            make_experiment(tree(tiny_folder, sentiment, base=base)),
            tmp_path / "out",
            backend="inline",
        )
    assert not (tmp_path / "out").exists()


def test_what_is_in_a_file_decides_what_is_done_and_not_where_it_lies(
    tiny_folder, sentiment, tmp_path
):
    """An edited prompt is another experiment; a moved file is the same one."""

    def ids(folder):
        keys = {"data": {"task": str(folder / "task.yaml")}}
        return [
            cell.id
            for cell in expand(make_experiment(tree(tiny_folder, sentiment, tasks={"mood": keys})))
        ]

    for name in ("moved", "edited"):
        shutil.copytree(sentiment, tmp_path / name)
    text = (sentiment / "task.yaml").read_text()
    (tmp_path / "edited" / "task.yaml").write_text(text.replace('prompt: "', 'prompt: "Well: '))
    assert (tmp_path / "edited" / "task.yaml").read_text() != text
    assert ids(tmp_path / "moved") == ids(sentiment)
    assert not set(ids(tmp_path / "edited")) & set(ids(sentiment))


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


def test_a_rate_that_diverges_is_not_chosen_and_not_a_failure(tiny_folder, sentiment, tmp_path):
    experiment = make_experiment(
        tree(
            tiny_folder,
            sentiment,
            methods=["lora"],
            seeds=[0],
            tune={"grid": {"train.lr": [1e30, 1e-3]}},
        )
    )
    outcome = run_cells(experiment, tmp_path, backend="inline")
    assert not outcome.failed
    (choice,) = read_results(tmp_path).choices
    assert choice["chosen"] == {"train.lr": 1e-3}
    assert [tried["mean"] is None for tried in choice["tried"]] == [True, False]


def test_killed_and_run_again_by_processes(tiny_folder, sentiment, tmp_path):
    """SIGKILL to the runner: its workers end too, and the next run goes on with the half cells."""
    base = tree(tiny_folder, sentiment, methods=["chain3"], seeds=[0, 1], tune={})
    base["base"]["recipe"]["steps"] = 300
    base["base"]["train"] |= {"save_every": 20}
    path, out = tmp_path / "experiment.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(base))
    code = (
        "import sys; from chainlora.experiments import run_experiment;"
        "run_experiment(sys.argv[1], sys.argv[2], workers=2)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    runner = subprocess.Popen([sys.executable, "-c", code, str(path), str(out)], env=environment)
    deadline = time.monotonic() + 300
    while not list(out.glob("cells/*/run/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    half = [run.parent for run in out.glob("cells/*/run/checkpoints")]
    assert half
    assert not list(out.glob("cells/*/result.json"))
    outcome = run_cells(load_experiment(path), out, backend="inline")
    assert outcome.num_run == 2
    assert not outcome.failed
    records = [json.loads(line) for line in (half[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["event"] == "step"]
    assert steps == list(range(1, 301))  # no step lost, none twice


def test_threads_and_gpus_are_shared_out():
    assert worker_environment(0, 10**6, {})["OMP_NUM_THREADS"] == "1"
    assert worker_environment(0, 1, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert worker_environment(3, 4, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(1, 2, {"CUDA_VISIBLE_DEVICES": "0"})


def test_room_is_what_memory_and_cores_leave(monkeypatch):
    monkeypatch.setattr("chainlora.experiments.execution.worker_pool.num_cores", lambda: 8)
    cell = {"peak_rss_mb": 1500.0, "hardware": {"device": "cpu"}}

    def room(*cells, workers="auto", **environment):
        found = Room(workers, environment, free_mb=10_000)
        for each in cells:
            found.learn(each)
        return found.workers

    assert room() == 1  # nothing known yet
    assert room(cell) == 5  # of 8000 MB, four fifths of what is free
    assert (
        room(cell, cell | {"peak_rss_mb": 2500.0})
        == room(cell | {"peak_rss_mb": 2500.0}, cell)
        == 3
    )
    assert room(cell | {"peak_rss_mb": 100.0}) == 8
    assert room(cell | {"peak_rss_mb": 100.0}, OMP_NUM_THREADS="4") == 2
    assert room(cell | {"peak_rss_mb": 50_000.0}) == 1
    assert room(cell | {"status": "diverged", "peak_rss_mb": None}) == 1
    gpu = cell | {"hardware": {"device": "cuda"}}
    assert (room(gpu), room(gpu, CUDA_VISIBLE_DEVICES="0,1,2")) == (1, 3)
    assert room(cell, workers=2) == 2


def test_workers_by_the_room_there_is(tiny_folder, sentiment, tmp_path, monkeypatch):
    """One cell alone; once it has shown its memory, as many as there are cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("chainlora.experiments.execution.worker_pool.num_cores", lambda: 3)
    numbers, ended = {True: set(), False: set()}, []

    def listen(record):
        if record["event"] == "cell":
            ended.append(record["cell"])
        if record["event"] == "poll":
            numbers[not ended].add(len(record["running"]))

    experiment = make_experiment(
        tree(tiny_folder, sentiment, methods=["lora"], seeds=[0, 1, 2, 3], tune={})
    )
    outcome = run_cells(experiment, tmp_path, workers="auto", listener=listen)
    assert (outcome.num_run, outcome.failed) == (4, {})
    assert numbers[True] == {1}
    assert max(numbers[False]) == 3


@pytest.mark.parametrize(
    ("workers", "backend", "message"),
    [
        (0, "local", "`workers` must be at least 1, or auto .got 0."),
        ("auto", "ray", "must be a number with Ray"),
    ],
)
def test_what_is_no_number_of_workers(tiny_folder, sentiment, tmp_path, workers, backend, message):
    experiment = make_experiment(tree(tiny_folder, sentiment))
    with pytest.raises(ConfigError, match=message):
        run_cells(experiment, tmp_path / "out", workers=workers, backend=backend)
    assert not (tmp_path / "out").exists()


def test_time_left_is_by_task_and_by_workers():
    assert time_left([], [("a", 1.0)], 0, 1) is None
    assert (
        time_left([("a", 10.0), ("b", 30.0)], [("a", 0.5), ("b", 1.0), ("c", 1.0)], 2, 2)
        == (5 + 30 + 20 + 40) / 2
    )


# --- statistics
# ------------------------------------------------------------------------------------


def brute_force(values):
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(total >= abs(sum(values)) - 1e-9 * sum(map(abs, values)) for total in sums) / len(
        sums
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5).map(lambda value: round(value, 2)), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_every_assignment(values):
    assert sign_flip_test(values) == pytest.approx(
        brute_force(values), abs=1e-12
    )  # both are counts over 2^n


def test_known_p_values():
    assert sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32  # the least that five pairs can reach
    assert sign_flip_test([0, 0, 0]) == 1
    assert sign_flip_test([1.0] * 30) == 2 / 2**30  # by halves, not by 2^30 sums
    # one heads-or-tails too many for the exact count: drawn, within 5 sd of the exact two-sided
    # binomial tail
    many = [1.0] * 32 + [-1.0] * 18
    exact = 2 * sum(math.comb(50, k) for k in range(32, 51)) / 2**50
    assert sign_flip_test(many, num_draws=100_000) == pytest.approx(
        exact, abs=5 * math.sqrt(exact / 100_000)
    )


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # worked by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_mean_and_deviation():
    assert mean_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(mean_sd([1.0])[1])


def test_the_bootstrap_interval():
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([2.0]) == (-math.inf, math.inf)
    values = [0.1, 0.4, -0.3, 0.9, 1.4, 0.2, -0.1, 0.8]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low < sum(values) / 8 < high
    # symmetric values need no correction: BCa and percentile agree, up to the draws' own noise
    symmetric = [-3.0, -1.0, 0.0, 1.0, 3.0]
    assert bootstrap_interval(symmetric) == pytest.approx(
        bootstrap_interval(symmetric, method="percentile"), abs=0.2
    )
    # large samples: the normal interval, mean ± 1.96 sd / √n, within 5 % of its width
    large = [math.sin(k) for k in range(1, 2001)]
    mean, sd = mean_sd(large)
    low, high = bootstrap_interval(large, num_resamples=2000)
    half = 1.96 * sd / math.sqrt(2000)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_the_bca_tails_are_scipy_s():
    # scipy 1.17.1: bootstrap((skewed,), np.mean, method="BCa", n_resamples=200_000), random_state 0
    # and 1
    skewed = [0.137, 0.211, 0.2543, 0.3071, 0.4219, 0.6127, 1.1037, 3.0119]
    low, high = bootstrap_interval(skewed, num_resamples=100_000)
    assert (low, high) == pytest.approx(
        (0.3525, 1.8403), abs=0.03
    )  # scipy's own two differ by 0.023


def test_a_verdict_needs_interval_and_test():
    assert judge(0.1, 0.5, 0.01) == "wins"
    assert judge(-0.5, -0.1, 0.05) == "loses"
    assert judge(0.1, 0.5, 0.06) == "undecided"
    assert judge(-0.1, 0.5, 0.01) == "undecided"
    many, five, none = compare_pairs([[1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.3, 1.0], [1.0] * 5, []])
    assert none is None
    assert many.verdict == "wins"
    assert many.p_holm == 3 * many.p == 6 / 2**8  # three were planned, whatever is there
    assert five.verdict == "undecided"  # five pairs cannot reach 5 %
    assert (
        five.smallest_p_holm == 2 * 2 / 32
    )  # the second in Holm's order, even if as clear as can be
    assert five.exact
    (drawn,) = compare_pairs([[1.0 + 0.01 * k for k in range(48)]])
    assert not drawn.exact
    assert (
        drawn.p == drawn.smallest_p_holm == 1 / (10**6 + 1)
    )  # the one seen, of a million drawn beside it


@pytest.mark.parametrize("num_comparisons", [1, 2, 4, 8])
def test_the_least_number_of_pairs_is_the_least_that_can_decide(num_comparisons):
    least = least_pairs(num_comparisons)
    clear = [[1.0 + 0.01 * k for k in range(n)] for n in (least, least - 1)]
    assert compare_pairs([clear[0]] * num_comparisons)[0].verdict == "wins"
    assert compare_pairs([clear[1]] * num_comparisons)[0].verdict == "undecided"


# --- costs
# -----------------------------------------------------------------------------------------


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


# --- report
# ----------------------------------------------------------------------------------------


def lines(**head):
    """A results file without a model: two methods, six seeds, the chain always two points ahead."""
    first = {
        "format": 1,
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
        "figures": ["scores", "differences", "chain_length", "rank_step_down"],
        "paper": "table1",
    } | head
    yield first
    for task, (method, ranks, ahead), seed in itertools.product(
        ("wsc", "cb"),
        (("lora", [8], 0.0), ("chain3", [8, 8, 8], 0.02), ("zero_shot", [], -0.1)),
        range(6),
    ):
        if method == "zero_shot" and seed:
            continue
        score = 0.6 + 0.01 * seed + ahead + 0.001 * (seed % 2) * bool(ahead)
        yield {
            "format": 1,
            "kind": "cell",
            "cell": f"{task}{method}{seed}",
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
            "flops": 1e9,
            "flops_6nd": 1e6,
            "wall_s": 1.5,
            "peak_rss_mb": 100,
            "ranks": ranks,
            "link_steps": [],
            "link_scores": [],
            "config": {},
            "versions": {"python": "3"},
            "hardware": {"device": "cpu"},
        }


def write_lines(path, **head):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(**head)))
    return path


def test_a_report_comes_from_the_results_file_alone(tmp_path):
    path = write_lines(tmp_path / "results.jsonl")
    report = report_experiment(path)
    assert "chain3 is better than lora over all tasks: +2.05" in report.markdown
    assert (
        "by task: 2 wins, 0 loses, 0 undecided; ahead on 2 of 2" not in report.markdown
    )  # 2 / 2^6, twice: 0.0625
    wins = {comparison.task: comparison.difference.verdict for comparison in report.comparisons}
    assert wins == {"wsc": "undecided", "cb": "undecided", "all tasks": "wins"}
    assert "| majority class | 63.50 | 63.50 |" in report.markdown
    assert "| paper: chain3 (OPT-1.3B) | 60.19 | 76.42 |" in report.markdown
    assert "| lora | 62.50 ± 1.87 (6) |" in report.markdown
    names = {file.name for file in report.files}
    assert {"report.md", "scores.csv", "differences.csv", "scores.tex", "differences.tex"} <= names
    figures = {
        f"{name}.{suffix}"
        for name in ("scores", "differences", "chain_length", "rank_step_down")
        for suffix in ("png", "svg")
    }
    assert figures <= names
    assert all(file.stat().st_size > 0 for file in report.files)
    assert r"$\pm$" in (tmp_path / "scores.tex").read_text()
    before = {file: file.read_bytes() for file in report.files}
    again = report_experiment(path)
    assert {file: file.read_bytes() for file in again.files} == before  # same results, same bytes


def test_operations_saved_stand_beside_the_paper_s(tmp_path):
    methods = {"lora": "One.", "chain_8_8": "Two.", "chain_8_4": "Down."}
    head, *cells = lines(paper="table3", tasks=["cb"], methods=methods, pairs=[], figures=[])
    cells = [cell for cell in cells if cell["task"] == "cb" and cell["method"] == "lora"]
    named = [
        cell | {"method": m, "flops_6nd": cost}
        for m, cost in (("chain_8_8", 3e12), ("chain_8_4", 2e12))
        for cell in cells
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *named]))
    assert (
        "| cb chain_8_4 | 1.00e+12 | 7.20e+11 | 0.000% |"
        in report_experiment(path, figures=False).markdown
    )


def change(path, change_line, **head):
    """Write made results after a change of each line but the first; None leaves a line out."""
    first, *rest = lines(**head)
    kept = [new for line in rest if (new := change_line(line)) is not None]
    path.write_text("".join(json.dumps(line) + "\n" for line in [first, *kept]))
    return path


def test_losses_are_told_apart_to_four_digits(tmp_path):
    def as_loss(cell):
        score = 0.72 + 0.001 * cell["seed"] - (0.0048 if cell["method"] == "chain3" else 0)
        return cell | {
            "metric": "loss",
            "score": score,
            "test": {"loss": score},
            "validation": {"loss": score},
        }

    path = change(
        tmp_path / "results.jsonl", as_loss, paper=None, figures=["scores", "differences"]
    )
    text = report_experiment(path).markdown
    assert (
        "chain3 is better than lora over all tasks: +0.0048 (95 % interval +0.0048 to +0.0048"
        in text
    )
    assert "| wsc | chain3 − lora | 6 | +0.0048 | 0.0000 | +0.0048 to +0.0048 |" in text
    assert "| lora | 0.7225 ± 0.0019 (6) |" in text


def test_a_choice_at_an_end_of_its_grid_is_marked(tmp_path):
    def choice(method, chosen, **point):
        tried = [
            {"point": {"train.lr": rate} | point, "mean": 0.5, "runs": 1}
            for rate in (1e-3, 2e-3, 4e-3)
        ]
        return {
            "format": 1,
            "kind": "choice",
            "task": "wsc",
            "method": method,
            "metric": "loss",
            "chosen": {"train.lr": chosen} | point,
            "tried": tried,
        }

    path = write_lines(tmp_path / "results.jsonl")
    note = "the chosen value is an end of its grid"
    assert note not in report_experiment(path, figures=False).markdown
    with path.open("a", encoding="utf-8") as file:
        for made in (
            choice("lora", 2e-3),
            choice("chain3", 1e-3, **{"chain.init": "gradient", "chain.seed": 7}),
        ):
            print(json.dumps(made), file=file)
    text = report_experiment(path, figures=False).markdown
    assert "| wsc lora | lr 0.002 | loss |" in text
    assert "| wsc chain3 | lr 0.001, init gradient, seed 7 (lowest tried) | loss |" in text
    assert note in text


def test_two_methods_that_train_nothing_are_one_pair(tmp_path):
    """One run each, whatever the number of seeds: nothing to test."""
    path = change(
        tmp_path / "results.jsonl",
        lambda cell: (
            cell | {"ranks": []} if cell["method"] != "chain3" and not cell["seed"] else None
        ),
        pairs=[["lora", "zero_shot"]],
        tasks=["wsc"],
    )
    (found,) = report_experiment(path, figures=False).comparisons
    assert (found.difference.num_pairs, found.difference.verdict) == (1, "undecided")


def test_where_seeds_draw_rows_one_run_stands_for_itself(tmp_path):
    path = write_lines(tmp_path / "results.jsonl", seed_keys=["train.seed", "data.data_seed"])
    text = report_experiment(path, figures=False).markdown
    assert "wsc zero_shot: seeds 1, 2, 3, 4, 5" in text
    assert "A seed sets train.seed and data.data_seed." in text
    assert (
        "Seeds vary the training alone"
        in report_experiment(write_lines(path), figures=False).markdown
    )


def test_a_task_without_losses_is_not_counted_among_them(tmp_path):
    def written(cell):
        return (
            cell | {"metric": "em", "test": {"em": cell["score"]}} if cell["task"] == "cb" else cell
        )

    report_experiment(change(tmp_path / "results.jsonl", written), figures=False)
    with (tmp_path / "differences.csv").open() as file:
        (loss,) = [row for row in csv.DictReader(file) if row["value"] == "held-out loss"]
    assert loss["task"] == "wsc"
    assert float(loss["p_holm"]) == float(loss["p"])


def test_over_all_tasks_each_task_weighs_alike(tmp_path):
    """Ten seeds of a task where the chain gains 10 points and two of one where it gains none: 5,
    not 8.3."""

    def scored(cell):
        if cell["task"] == "cb" and cell["seed"] > 1:
            return None
        gain = 0.1 if cell["task"] == "wsc" and cell["method"] == "chain3" else 0.0
        return cell | {"score": 0.5 + gain}

    report = report_experiment(change(tmp_path / "results.jsonl", scored), figures=False)
    whole = next(each.difference for each in report.comparisons if each.task == "all tasks")
    assert whole.mean == pytest.approx(5.0)
    assert whole.num_pairs == 4


def test_a_verdict_does_not_hang_on_how_much_of_the_plan_is_done(tmp_path):
    head = {"methods": {"lora": "One.", "chain3": "Three.", "chain2": "Two."}}
    pairs = [["chain3", "lora"], ["chain2", "lora"]]
    path = write_lines(tmp_path / "results.jsonl", **head, tasks=["wsc"], pairs=pairs)
    only = report_experiment(path, figures=False).comparisons[0].difference
    assert only.p_holm == 2 * only.p  # chain2 has no cell yet


def test_a_report_of_what_is_there_so_far(tmp_path):
    """A killed experiment may have, for one task, nothing but zero_shot: every figure is drawn all
    the same."""
    path = change(
        tmp_path / "results.jsonl",
        lambda cell: None if cell["task"] == "cb" and cell["method"] != "zero_shot" else cell,
    )
    report = report_experiment(path)
    assert (tmp_path / "chain_length.png").stat().st_size > 0
    assert "cb lora: seeds 0, 1, 2, 3, 4, 5; cb chain3: seeds" in report.markdown


def test_exact_match_stands_beside_f1_and_the_paper_s_deviation_beside_its_mean(tmp_path):
    def as_words(cell):
        return cell | {"metric": "token_f1", "test": {"token_f1": cell["score"], "em": 0.25}}

    path = change(tmp_path / "results.jsonl", as_words, paper="table4")
    text = report_experiment(path, figures=False).markdown
    assert "| wsc lora | em | 25.00 | 6 |" in text
    assert "| paper: lora (OPT-1.3B) | 56.53 ± 7.67 | 75.35 ± 4.84 |" in text


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(RunError, match="must be readable"):
        read_results(tmp_path)
    path = write_lines(tmp_path / "results.jsonl", format=2)
    with pytest.raises(RunError, match=r"must be of format 1 \(got 2 in .* line 1\)"):
        report_experiment(path)
    path.write_text('{"format": 1}\n')
    with pytest.raises(
        RunError, match=r"must be of kind experiment, choice or cell \(got None in .* line 1\)"
    ):
        read_results(path)
    path.write_text("{\n")
    with pytest.raises(RunError, match="line 1"):
        read_results(path)
    with pytest.raises(ConfigError, match=r"`paper` must be one of table1, .*'table9'"):
        report_experiment(write_lines(path, paper="table9"))


def test_the_report_of_a_real_run(done):
    _, out, _ = done
    report = report_experiment(out, out / "report")
    assert [summary.method for summary in report.summaries] == ["lora", "chain3"]
    assert "Chosen on validation rows for each task and method apart" in report.markdown
    assert (
        "chain3 cannot be told apart from lora on mood" in report.markdown
    )  # two seeds decide nothing
    assert "1 of these could not have been decided" in report.markdown
    assert "Holm's p is 0.5 at best" in report.markdown


# --- compare
# ---------------------------------------------------------------------------------------


def test_compare_on_a_user_s_own_files(tiny_folder, sentiment, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{word} is", "completion": f" {word}"}) + "\n"
            for word in ("one", "two", "three", "four")
        )
    )
    config = make_config(
        {
            "model": str(tiny_folder),
            "data": {"train": str(rows), "validation": str(rows)},
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
    experiment = comparison(config, ["lora", "chain2"], [0])
    assert experiment.base["recipe"] == {"rank": 2, "steps": 3}
    for keys, missing in (({"validation": None, "test": str(rows)}, "validation"), ({}, "test")):
        data = config.data.model_copy(update=keys)
        with pytest.raises(
            ConfigError, match=rf"chosen on validation rows.*got no data\.{missing}"
        ):
            comparison(
                config.model_copy(update={"data": data}), ["lora"], [0], learning_rates=[1e-3]
            )


def test_compare_lets_no_method_choose_among_more_points(tiny_folder, sentiment):
    """With keep_best, a chain would take the best of its knots where LoRA has its end alone."""
    base = tree(tiny_folder, sentiment)["base"]
    config = make_config(
        {
            "model": base["model"],
            "data": base["data"],
            "chain": {"ranks": [2, 2], "steps": [2, 1]},
            "train": {"keep_best": True, "early_stop": 3, "select_metric": "loss", "lr": 3e-3},
        }
    )
    (cell, *_) = expand(comparison(config, ["lora", "chain2"], [0]))
    assert (cell.config.train.keep_best, cell.config.train.early_stop, cell.config.train.lr) == (
        False,
        None,
        3e-3,
    )
