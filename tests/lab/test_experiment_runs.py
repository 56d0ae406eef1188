"""Running the cells of an experiment: what is chosen, what is resumed, what fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import records_of

from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora_lab import (
    experiment_progress,
    load_experiment,
    read_results,
    report_experiment,
    run_cells,
)
from chainlora_lab.worker import worker_environment

# a decay of 1e6 a step: weights overflow
WILD = {"batch_size": 8, "lr": 1e3, "weight_decay": 1e3, "max_grad_norm": None}


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
    assert sum(cell["link_tokens"]) == cell["tokens"] > 0
    # memory of one LoRA, chain or not
    assert len({c["trainable_parameters"] for c in results.finals}) == 1


@pytest.mark.parametrize("what", ["rows", "model"])
def test_what_a_later_cell_lacks_is_missed_before_the_first_runs(small, sentiment, tmp_path, what):
    gone = str(tmp_path / ("gone.jsonl" if what == "rows" else "gone.gguf"))
    keys = {"data": {"train": gone}} if what == "rows" else {"model": gone}
    mood = {"data": {"task": str(sentiment / "task.yaml")}}
    tasks = {"mood": mood, "later": mood | keys | {"data": mood["data"] | keys.get("data", {})}}
    with pytest.raises(ChainLoRAError, match=r"task later, method \w+: .*\(got .*gone\."):
        run_cells(small(tasks=tasks), tmp_path / "out", backend="inline")
    assert not (tmp_path / "out").exists()  # earlier results there would stay as they are


def test_results_without_their_cells_are_resumed_and_none_is_lost(done, small, tmp_path):
    """Committed results come without the cells behind them; so do cells that were once taken from
    elsewhere."""
    experiment, _, outcome = done
    (tmp_path / "results.jsonl").write_text(outcome.results.read_text())
    fewer = small(methods=["lora"])
    assert run_cells(fewer, tmp_path, backend="inline", max_cells=1).num_run == 0
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 0
    shutil.rmtree(next((tmp_path / "cells").iterdir()))  # as if killed meanwhile
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 0
    assert (tmp_path / "results.jsonl").read_text() == outcome.results.read_text()
    taken = tmp_path / "taken"
    run_cells(experiment, taken, backend="inline", reuse=[outcome.results])
    assert run_cells(experiment, taken, backend="inline").num_run == 0


def test_what_another_runner_ends_meanwhile_stays(done, tmp_path):
    """Its results were deleted where they came between a look at what is done and the work."""
    experiment, out, _ = done

    def another(record):
        if record["event"] == "plan" and not (tmp_path / "cells").exists():
            shutil.copytree(out / "cells", tmp_path / "cells")

    before = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}
    assert not run_cells(experiment, tmp_path, backend="inline", listener=another).failed
    kept = {
        path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/result.json")
    }
    assert kept == before


def test_cells_of_other_rows_or_weights_are_not_put_into_one_table(small, sentiment, tmp_path):
    folder = tmp_path / "rows" / "mood"
    shutil.copytree(sentiment, folder)
    data = dict.fromkeys(("train", "validation", "test"))
    data |= {"task": str(sentiment / "task.yaml"), "dir": str(folder)}
    data |= {"num_validation": 10, "num_train": 20}
    keys = {"tasks": {"mood": {"data": data}}, "tune": {}, "methods": ["lora"]}
    one = small(**keys)
    run_cells(one, tmp_path / "out", backend="inline")
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[::2]) + "\n")
    message = r"must be of the same rows \(got \d:\w+ in mood lora seed 0, .*new output"
    # the third seed shows it; once it is there, nothing more is computed
    for seeds, to_run in ((3, [["mood lora seed=2"]]), (4, [])):
        plans = []
        more = one.model_copy(update={"seeds": tuple(range(seeds))})
        with pytest.raises(RunError, match=message):
            run_cells(more, tmp_path / "out", backend="inline", listener=plans.append)
        assert [plan["todo"] for plan in plans if plan["event"] == "plan"] == to_run


@pytest.mark.parametrize(("method", "steps"), [("lora", 6), ("full", 2)])  # in its last step
def test_a_final_run_that_diverged_is_a_failure_however_often_it_is_asked_for(
    small, base, tmp_path, method, steps
):
    base |= {"train": WILD, "recipe": base["recipe"] | {"steps": steps}}
    experiment = small(base=base, methods=[method], tune={})
    for num_run in (2, 0):
        outcome = run_cells(experiment, tmp_path, backend="inline")
        assert outcome.num_run == num_run
        assert set(outcome.failed) == {f"mood {method} seed=0", f"mood {method} seed=1"}
    text = report_experiment(tmp_path, figures=False).markdown
    assert "**Diverged** (2)" in text
    assert "Not there yet" not in text


def test_a_tuning_cell_that_failed_leaves_nothing_chosen(small, tmp_path):
    """One rate was never measured: a choice among the others would pass for a choice among all."""
    tune = {"grid": {"data.shots": [0, 10**6]}}  # so many demonstrations leave no rows
    experiment = small(methods=["lora"], seeds=[0], tune=tune)
    outcome = run_cells(experiment, tmp_path, backend="inline")
    assert len(outcome.failed) == 1
    assert read_results(tmp_path).choices == []
    assert "mood lora: seeds 0" in report_experiment(tmp_path, figures=False).markdown


def test_what_cannot_be_run_chosen_or_scored_is_refused_before_anything_runs(small, base, tmp_path):
    tune = {"grid": {"train.lr": [1e-3, 1e-2]}, "metric": "acuracy"}
    base["data"] = {"train": base["data"]["train"]}
    scored = base | {"data": base["data"] | {"test": base["data"]["train"]}}
    for keys, workers, message in (
        ({}, 0, r"`workers` must be at least 1 \(got 0\)"),
        ({}, 2, r"`inline` runs one cell at a time \(got 2 workers\)"),
        ({"base": scored}, 1, r"mood: hyper-parameters are chosen on validation rows \(got none"),
        ({"tune": tune}, 1, r"`tune.metric` must be one of accuracy, loss \(got 'acuracy'\)"),
        ({"base": base}, 1, "compared on rows they do not train on"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_cells(small(**keys), tmp_path / "out", workers=workers, backend="inline")
    assert not (tmp_path / "out").exists()


def test_a_rate_that_diverges_is_not_chosen_and_not_a_failure(small, base, tmp_path):
    tune = {"grid": {"train.lr": [1e3, 1e-3]}}
    experiment = small(base=base | {"train": WILD}, methods=["lora"], seeds=[0], tune=tune)
    assert not run_cells(experiment, tmp_path, backend="inline").failed
    (choice,) = read_results(tmp_path).choices
    assert choice["chosen"] == {"train.lr": 1e-3}
    assert [tried["mean"] is None for tried in choice["tried"]] == [True, False]


@pytest.mark.slow  # a minute: processes that train until they are killed
def test_killed_and_run_again_by_processes(base, written, tmp_path):
    """SIGKILL to the runner: its workers end too, and the next run resumes the unfinished cells."""
    base["recipe"]["steps"] = 300
    base["train"] |= {"save_every": 20}
    path, out = written(base=base, methods=["chain3"], tune={}), tmp_path / "out"
    code = (
        "import sys; from chainlora_lab import run_experiment;"
        "run_experiment(sys.argv[1], sys.argv[2], workers=2)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    runner = subprocess.Popen([sys.executable, "-c", code, str(path), str(out)], env=environment)
    deadline = time.monotonic() + 300
    saved = "cells/*/run/stages/main/checkpoints"
    while not list(out.glob(f"{saved}/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    half = [path.parents[2] for path in out.glob(saved)]
    assert half
    assert not list(out.glob("cells/*/result.json"))
    outcome = run_cells(load_experiment(path), out, backend="inline")
    assert outcome.num_run == 2
    assert not outcome.failed
    records = records_of(half[0])
    steps = [record["step"] for record in records if record["event"] == "step"]
    assert steps == list(range(1, 301))  # no step lost, none twice


def test_threads_and_gpus_are_shared_out():
    assert worker_environment(0, 10**6, {})["OMP_NUM_THREADS"] == "1"
    assert worker_environment(0, 1, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert worker_environment(3, 4, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(1, 2, {"CUDA_VISIBLE_DEVICES": "0"})


def test_workers_share_the_cells(small, tmp_path):
    most = []

    def listen(record):
        if record["event"] == "poll":
            most.append(len(record["running"]))

    outcome = run_cells(small(methods=["lora"], tune={}), tmp_path, workers=2, listener=listen)
    assert (outcome.num_run, outcome.failed) == (2, {})
    assert max(most) == 2


@pytest.mark.slow
def test_a_grid_is_extended_while_its_end_is_the_best_up_to_the_limit(small, tmp_path):
    """Far too small rates: the higher, the better, so every value beyond the top is asked for."""
    tune = {"grid": {"train.lr": [1e-5, 1e-4]}, "extend": {"train.lr": 2}, "metric": "loss"}
    experiment, plans = small(methods=["lora"], seeds=[0], tune=tune), []
    first = run_cells(experiment, tmp_path, backend="inline", max_cells=3)
    assert (first.num_run, first.num_done) == (3, 3)  # the grid, and one value beyond it
    outcome = run_cells(experiment, tmp_path, backend="inline", listener=plans.append)
    (choice,) = read_results(tmp_path).choices
    assert [each["point"]["train.lr"] for each in choice["tried"]] == [1e-5, 1e-4, 1e-3, 1e-2]
    assert choice["chosen"] == {"train.lr": 1e-2}  # the limit: no third value beyond the grid
    assert outcome.num_done == outcome.num_cells == 4  # the final cell is the one that was chosen
    assert [plan["todo"] for plan in plans if plan["event"] == "plan"] == [
        ["mood lora seed=0 lr=0.01"],
        [],
    ]
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 0


@pytest.mark.slow
def test_several_seeds_choose_apart_from_those_compared(small, tmp_path):
    tune = {"grid": {"train.lr": [1e-3, 1e-2]}, "seeds": [10, 11]}
    experiment = small(methods=["lora"], seeds=[0], tune=tune)
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 5
    results = read_results(tmp_path)
    (choice,) = results.choices
    assert [each["runs"] for each in choice["tried"]] == [2, 2]
    for each in choice["tried"]:
        assert each["mean"] == pytest.approx(sum(each["values"]) / 2)
    text = report_experiment(tmp_path, figures=False).markdown
    assert "of 2 seeds |" in text
    assert "Compared seeds that also chose" not in text


def test_tuning_shows_validation_scores_and_never_those_of_the_test_rows(
    small, base, tmp_path, capsys
):
    base["data"] = base["data"] | {"num_test": 5}  # another number: other accuracies
    experiment = small(base=base)
    records = []
    run_cells(experiment, tmp_path, backend="inline", listener=records.append)
    shown = {each["cell"]: each for each in records if each["event"] == "cell"}
    for line in read_results(tmp_path).cells:
        name = f"{line['task']} {line['method']} seed={line['seed']} lr={line['point']['train.lr']}"
        if line["phase"] == "tune":
            assert shown[name]["split"] == "validation"
            assert shown[name]["score"] == line["validation"]["accuracy"]
        elif name in shown and shown[name]["split"] == "test":
            assert shown[name]["score"] == line["test"]["accuracy"]
    progress = experiment_progress()
    for record in records:
        progress(record)
    said = capsys.readouterr().err
    assert "tune: 4 cells, 0 done before, 4 to run" in said
    assert said.count("validation accuracy") == 4


def test_a_gradient_start_is_paid_for(small, tmp_path):
    """Its sweeps read batches that no step counts: three a link, over `init_batches` batches
    each."""
    methods = {"chain3": {}, "chain3_fw": {"chain": {"init_batches": 2}}}
    experiment = small(methods=methods, seeds=[0], tune={})
    run_cells(experiment, tmp_path, backend="inline")
    plain, directed = read_results(tmp_path).finals
    assert plain["start_tokens"] == 0
    assert directed["start_tokens"] == directed["tokens"] - plain["tokens"] > 0
    records = records_of(tmp_path / "cells" / directed["cell"] / "run")
    steps = [record["tokens"] for record in records if record["event"] == "step"]
    # links of two steps: each reads its own batches three times
    assert directed["start_tokens"] == 3 * sum(steps)
    assert sum(directed["link_tokens"]) == directed["tokens"]
