"""The verbs that measure, by the command line: what they say and how they stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import write_rows

from chainlora_lab import plan_experiment, read_results, report_experiment
from chainlora_lab.planning import measured_power
from lab.cases import change


def test_an_experiment_from_the_command_line(chainlora, base, written, sentiment, tmp_path):
    base |= {"recipe": {"rank": 2, "steps": 3}, "data": {"num_validation": 8}}
    mood = {"data": {"task": str(sentiment / "task.yaml"), "dir": str(sentiment)}}
    tasks = {"mood": mood, "rte": {"data": {"dir": str(tmp_path)}}}
    file, out = written(base=base, tasks=tasks, tune={}), tmp_path / "out"
    words = ("--seeds", "[0]", file, "--output", out, "--backend", "inline")  # a key before it
    run = ("experiment", "run", *words)
    chainlora(*run).refused("'rte' needs its 'train' rows", "or leave the folder out")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"premise": "It rains."}\n' * 2000)
    outcome = chainlora(*run)  # a failed cell: the others go on, and the end says so
    assert (outcome.status, outcome.out) == (1, "")
    assert "mood chain3 seed=0: accuracy " in outcome.err
    told = "every cell must end (got 2 of 4 failed, first rte lora seed=0: "
    assert outcome.err.splitlines()[-1].startswith(f"chainlora: error: {told}")
    found = chainlora(*run, "--tasks", "[mood]", "--json")
    assert found.json["run"] == 0  # what was done is not done again
    spaced = ("--output", tmp_path / "my out", "--reuse", out / "results.jsonl")
    said = chainlora(*run, "--tasks", "[mood]", *spaced).out
    assert said.endswith(f"next: chainlora experiment report '{tmp_path}/my out'\n")

    report = chainlora(f"experiment report {out}")
    assert report.status == 0
    assert report.out.startswith("# small: mood\n")
    assert "| mood | chain3 − lora | 1 |" in report.out
    files = chainlora(f"experiment report {out} --output {tmp_path}/report --json").json["files"]
    assert {"report.md", "scores.png", "scores.tex"} <= {Path(name).name for name in files}
    again = f"experiment run {file} --output {out}"
    chainlora(f"{again} --methods [lara]").refused("'lara'", "did you mean 'lora'")
    chainlora(f"{again} --taks [rte]").refused("taks", "did you mean 'tasks'")
    chainlora(f"experiment report {tmp_path}").refused("results file must be readable")
    chainlora(f"experiment report {file}").refused("name the folder of `experiment run`")
    chainlora(f"train {file}").refused("an experiment); chainlora experiment run ")
    assert chainlora(f"experiment run --output {out}").status == 2


def test_compare_quick_reads_few_rows_in_one_seed_and_says_that_it_decides_nothing(
    chainlora, tiny_folder, tmp_path
):
    rows = [{"prompt": f"{n} is", "completion": f" {n}"} for n in range(120)]
    parts = {"train": rows[:90], "test": rows[90:]}
    data = {name: str(write_rows(tmp_path / f"{name}.jsonl", parts[name])) for name in parts}
    tree = {"model": str(tiny_folder), "start_data": "none", "chain": {"epochs": [50]}}
    tree["stages"] = [{"name": name, "data": data} for name in "ab"]  # the same rows
    (tmp_path / "stages.yaml").write_text(json.dumps(tree))
    asked = f"compare {tmp_path}/stages.yaml --methods combine,replay --backend inline"
    done = chainlora(f"{asked} --quick")
    assert done.status == 0, done.err
    assert "1 to go, about 0:" in done.err
    assert done.err.endswith("--quick decides nothing: few rows and steps; leave it out\n")
    cells = read_results("runs/stages-quick").finals
    assert [cell["seed"] for cell in cells] == [0, 0]
    lengths = {each["chain"]["steps"][0] for cell in cells for _, each in cell["config"]["stages"]}
    assert lengths == {4}
    for seeds in ("0", "a", "0,b"):
        assert "a number above 0, or seeds with comm" in chainlora(f"{asked} --seeds {seeds}").err


def test_compare_from_the_command_line(chainlora, config, finished, tmp_path):
    two = f"compare {config} --methods lora,chain2 --seeds 0,1 --backend inline --output {tmp_path}"
    outcome = chainlora(f"{two}/out")
    assert outcome.status == 0, outcome.err
    assert "too few pairs to compare chain2 with lora" in outcome.out  # two seeds decide nothing
    assert (tmp_path / "out" / "report.md").read_text() == outcome.out.removesuffix("\n")
    assert outcome.err.endswith(f"report: {tmp_path}/out/report.html\n")
    inside = f"compare {config} --methods lora,chain2 --backend inline --output {finished}"
    for words in (inside, f"experiment report {tmp_path}/out --output {finished}/out"):
        chainlora(words).refused("`output` must lie outside other runs")
    chainlora(f"{two}/o --learning-rates 1e-3,1e-2").refused("got no data.test")
    chainlora(f"{two}/o --train.lrr 1").refused("did you mean 'lr'")  # keys as `train` takes them
    chainlora(f"experiment plan {config}").refused("one run); chainlora compare ")
    other = f"compare {config} --output {tmp_path}/o --methods"
    chainlora(f"{other} chane2").refused("did you mean 'chain2'")
    chainlora(f"{other} lora,lora").refused("`compare` needs two methods")
    chainlora(f"{other} lora,").refused("`compare` needs two methods (got lora)")
    spelled = chainlora(f"{other} lora,chain2 --learning_rates a")  # as keys may be
    assert spelled.err.endswith("numbers with commas between (got 'a')\n")
    chainlora(f"{other} lora,mine.yaml").refused(
        "got the file 'mine.yaml'", "`methods` of an experiment file"
    )
    own = f"{other} lora,mine --methods.mine"
    chainlora(f"{own}.train.lr 5e-3 --learning-rates 1e-3,1e-2").refused("got mine with train.lr")
    chainlora(f"{own}.settings.rank 3").refused("(got rank); for ranks, give recipe.ranks")
    chainlora(f"{own}.chain.ranks [8]").refused("(got chain.ranks beside it); give recipe.ranks")
    assert not (tmp_path / "o").exists()


# --- plans ---


def test_a_plan_says_what_could_be_found_and_how_many_pairs_a_difference_needs(
    done, chainlora, written, tmp_path
):
    _, out, _ = done
    path = written(seeds=[*range(8)])
    before = sorted(tmp_path.rglob("*"))
    words = f"--reuse {out}/results.jsonl --difference 5 --json"
    plan = chainlora(f"experiment plan {path} {words}").json
    assert sorted(tmp_path.rglob("*")) == before  # nothing is run or written
    assert (plan["num_cells"], plan["num_done"]) == (18, 6)
    (power,) = plan["power"]
    report = report_experiment(out, tmp_path / "report", figures=False)
    assert "\n6 cells, " in report.markdown  # two of them have two lines: they tuned as well
    sd = report.comparisons[0].difference.sd
    assert (power["sd"], power["num_measured"], power["num_pairs"]) == (sd, 2, 8)
    assert power["needed"] is None or power["needed"] >= 6
    assert plan["notes"] == [
        "hyper-parameters are chosen by seeds that are compared too (0); `tune.seeds` of their own "
        "keep the comparison free of that choice"
    ]


def test_a_plan_has_one_pair_a_task_of_two_methods_that_train_nothing(tmp_path):
    def untrained(cell):
        return cell | {"ranks": []} if cell["seed"] == 0 else None

    path = change(tmp_path / "results.jsonl", untrained, pairs=[["chain3", "zero_shot"]])
    (power,) = measured_power(read_results(path))
    assert (power.task, power.num_measured, power.num_pairs) == ("all tasks", 2, 2)


@pytest.mark.parametrize(
    ("num_seeds", "methods", "said"),
    [
        (3, ["lora", "chain3"], "3 seeds cannot decide anything, "),
        (6, ["lora", "chain3"], None),
        (5, ["lora", "chain3", "chain2"], "5 seeds cannot decide anything, "),
        (6, ["lora", "chain3", "chain2", "relora"], "anything beside the primary comparison, "),
    ],
)
def test_a_plan_says_what_a_primary_comparison_needs(written, num_seeds, methods, said):
    """Nothing was said of a single one, as if three seeds could decide it."""
    keys = {"methods": methods, "primary": ["chain3", "lora"], "tune": {}}
    notes = plan_experiment(written(seeds=[*range(num_seeds)], **keys)).notes
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes)


def test_plan_and_run_from_the_command_line(done, written, tmp_path, chainlora):
    _, out, _ = done
    path, results = written(), out / "results.jsonl"
    said = chainlora(f"experiment plan {path} --reuse {results} --difference 2").out
    assert "6 cells, 6 of them done" in said
    assert "note: 2 seeds cannot decide anything" in said
    found = chainlora(f"experiment plan {path} --output {out} --json").json
    assert found["power"][0]["detectable"] is None  # JSON has no infinity
    once = f"--output {tmp_path}/out --backend inline --reuse {results} --max-cells 1"
    outcome = chainlora(f"experiment run {path} {once} --seeds [0,1,2] --json")
    counts = {key: outcome.json[key] for key in ("cells", "run", "done", "left")}
    assert counts == {"cells": 8, "run": 1, "done": 7, "left": 1}


def test_compare_extends_its_rates(chainlora, config, sentiment, tmp_path):
    keys = f"--data.test {sentiment}/validation.jsonl --chain.ranks 2 --chain.steps 6"
    command = f"compare {config} {keys} --output {tmp_path}/out"
    command += " --methods lora --seeds 1 --backend inline"
    assert chainlora(f"{command} --extend 1").status == 2  # nothing to extend
    outcome = chainlora(f"{command} --learning-rates 1e-6,1e-5 --extend 1")
    assert outcome.status == 0
    assert "lr 0.0001 (highest tried)" in outcome.out


@pytest.mark.slow  # processes that train until they are interrupted
def test_ctrl_c_says_that_the_same_command_resumes(config, tmp_path):
    """`train --resume`, which was the advice, is for a run and not for an experiment."""
    out, chain = tmp_path / "out", ["--chain.ranks", "2", "--chain.steps", "100000"]
    command = ["compare", str(config), *chain, "--methods", "lora,chain2", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "chainlora", *command, "--output", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        records = "cells/*/run/stages/main/metrics.jsonl"
        while not list(out.glob(records)) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
        _, said = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    assert "the same command resumes" in said.splitlines()[-1]
    assert "--resume" not in said
    assert "Traceback" not in said
