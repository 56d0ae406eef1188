"""`compare` on a config with stages: ways to add data sets, of the lab and of plug-ins."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import write_rows

import chainlora_lab.ewc
from chainlora import open_run, stage_matrix
from chainlora.config.reading import make_config
from chainlora.errors import ConfigError
from chainlora_lab import compare, comparison, expand, make_experiment, read_results
from chainlora_lab.methods import shipped_ways
from chainlora_lab.sequences import WAYS, Case, _of_all
from chainlora_lab.ways import COMBINERS, REGULARISERS
from lab.cases import sequence


@pytest.fixture
def stages(tiny_folder, tmp_path):
    """Return a function that writes a config with two stages, and returns its path."""

    def write(**keys):
        path = tmp_path / "stages.yaml"
        path.write_text(yaml.safe_dump(sequence(tiny_folder, tmp_path, **keys)))
        return path

    return write


def finals(out: Path) -> dict[tuple[str, int], dict]:
    return {(cell["method"], cell["seed"]): cell for cell in read_results(out).finals}


def test_ways_are_compared_by_the_matrix_s_scores_and_resume(chainlora, stages, tmp_path):
    general = [{"text": f"the {a} and the {b}"} for a in ("cat", "mat") for b in ("hill", "two")]
    rows = str(write_rows(tmp_path / "general.jsonl", general))
    config, out = stages(start_data={"validation": rows}), tmp_path / "out"
    words = ["compare", config, "--methods", "combine,replay,ewc", "--seeds", "1"]
    words += ["--backend", "inline", "--output", out]
    shown = chainlora(*words)
    assert shown.status == 0, shown.err
    assert "| sequence | ewc − combine | 1 |" in shown.out
    assert "## By stage" in shown.out
    found = finals(out)
    assert {*found} == {(way, 0) for way in ("combine", "replay", "ewc")}
    (ours,) = (out / "beside").glob("*/history.json")
    matrix = stage_matrix(ours.parent)
    cell = found["combine", 0]
    for stage in cell["stages"]:
        column = matrix.stages.index(stage["stage"])
        own = matrix.grid[matrix.states.index(stage["stage"])][column].value
        assert stage["own"] == pytest.approx(own, rel=1e-5)
        assert stage["end"] == pytest.approx(matrix.grid[-1][column].value, rel=1e-5)
    base, *_, last = (row[0].value for row in matrix.grid)
    assert cell["general"] == pytest.approx({"base": base, "end": last}, rel=1e-5)
    assert [found[way, 0]["exported_rank"] for way in ("combine", "replay", "ewc")] == [16, 4, 2]

    one = found["ewc", 0]  # as if killed while the second stage was trained
    folder = out / "cells" / one["cell"]
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "run" / "style")
    for name in ("results.jsonl", "run/style.safetensors"):
        (out / name if name == "results.jsonl" else folder / name).unlink()
    first = (folder / "run" / "facts" / "history.json").stat().st_mtime_ns
    assert "1 to run" in chainlora(*words).err
    again = finals(out)["ewc", 0]
    assert again["score"] == one["score"]
    assert (folder / "run" / "facts" / "history.json").stat().st_mtime_ns == first


def test_ways_that_merge_nothing_are_what_they_say(stages, tmp_path):
    config = yaml.safe_load(stages(chain={"ranks": [2], "epochs": [2]}).read_text())
    for stage in config["stages"]:
        stage["data"]["validation"] = 0.25  # which `all_at_once` must not learn
    names = ["one_lora", "all_at_once", "alone", "base", "mean"]
    report = compare(config, names, [0], tmp_path / "out", backend="inline")
    cells = {name: cell for (name, _), cell in finals(tmp_path / "out").items()}
    assert [s.method for s in report.summaries] == names
    ends, owns = (
        {n: [each[key] for each in cell["stages"]] for n, cell in cells.items()}
        for key in ("end", "own")
    )
    assert ends["alone"] == owns["alone"] == owns["mean"]
    assert owns["base"] == owns["all_at_once"] == [None, None]
    assert owns["one_lora"][1] == ends["one_lora"][1]
    assert min(ends["base"]) > max(ends["all_at_once"])  # it has learned both
    assert cells["base"]["ranks"] == []
    run = open_run(tmp_path / "out" / "cells" / cells["all_at_once"]["cell"] / "run")
    kept = [run.kept([name])[name] for name in ("facts", "style", "all_at_once")]
    counts = [each.counts["train"] for each in kept]
    assert counts[2] == counts[0] + counts[1] < 18  # of both files
    adapters = [cells[name]["adapters"] for name in names]
    ranks = [cells[name]["exported_rank"] for name in names]
    assert (adapters, ranks) == ([1, 1, 2, 1, 1], [2, 2, None, 0, None])


def test_a_rank_and_steps_train_no_stage_again(chainlora, stages, tmp_path):
    """And they read the rows that the combination reads: `keep_conflicts` was lost."""
    config, out = stages(data={"keep_conflicts": True}), tmp_path / "out"
    words = ["--seeds", "1", "--methods", "combine,small,steps"]
    words += ["--methods.small.settings.rank", "4", "--methods.steps.settings.steps", "3"]
    shown = chainlora("compare", config, *words, "--backend", "inline", "--output", out)
    assert shown.status == 0, shown.err
    cells = {name: cell for (name, _), cell in finals(out).items()}
    ranks = {name: cell["exported_rank"] for name, cell in cells.items()}
    assert ranks == {"combine": 16, "small": 4, "steps": 16}
    assert len({cell["score"] for cell in cells.values()}) == 3
    (beside,) = (out / "beside").glob("*/history.json")
    shared = open_run(beside.parent)
    for name, steps in {"small": 0, "steps": 3}.items():
        run = open_run(out / "cells" / cells[name]["cell"] / "run")
        assert run.at("facts").state == shared.at("facts").state
        assert (run.facts[0].num_steps, run.entry.how.keep_conflicts) == (steps, True)


def test_a_combiner_and_a_regulariser_of_one_file_each(chainlora, stages, tmp_path):
    """EWC is such a file: a copy of it under another name is what the shipped one is."""
    own = Path(chainlora_lab.ewc.__file__).read_text().replace('["ewc"]', '["held"]')
    (tmp_path / "held.py").write_text(own)
    page = Path(chainlora_lab.__file__).parents[2] / "docs/experiments.md"
    block = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    (tmp_path / "mine.py").write_text(block)
    words = ["compare", stages(), "--plugins", f"[{tmp_path}/held.py, {tmp_path}/mine.py]"]
    words += ["--methods", "held,ewc,last,none,alone", "--methods.none.preset", "last"]
    words += ["--methods.none.settings.share", "0", "--methods.held.settings.penalty", "10"]
    words += ["--methods.ewc.settings.penalty", "10", "--seeds", "1", "--backend", "inline"]
    shown = chainlora(*words, "--output", tmp_path / "out")
    assert shown.status == 0, shown.err
    found = {name: cell for (name, _), cell in finals(tmp_path / "out").items()}
    assert found["held"]["stages"] == found["ewc"]["stages"]
    style = {name: cell["stages"][1]["end"] for name, cell in found.items()}
    assert style["last"] == pytest.approx(style["alone"], rel=1e-5)
    assert style["none"] > style["last"]
    assert found["last"]["config"]["way"] == "last"


@pytest.mark.parametrize(
    ("keys", "methods", "said"),
    [
        ({}, "combine,lora", "lora is none .*name some of all_at_once"),
        ({}, "combine,combin", "unknown method 'combin'.*did you mean.*`plugins`"),
        ({}, "combine,ewc --methods.ewc.settings.strength 1", "must be those of ewc .*strength"),
        ({}, "ewc,combine --methods.combine.settings.rank 0", "settings.rank.* above 0 .got 0"),
        ({}, "combine,one_lora --stages.style.chain.ranks [4]", "one link in each stage"),
        ({}, "combine,all_at_once --stages.style.data.max_length 9", "other keys of data"),
        ({}, "combine,all_at_once --stages.style.train.lr 0.1", "other keys of data, chain or"),
        ({}, "combine,all_at_once --stages.style.chain.alpha 2", "other keys of data, chain or"),
        ({"start": "runs/other"}, "combine,replay", "trains from the bare base"),
        ({"train": {"loss": "dpo"}}, "combine,replay", "answers to rows .*pairs in facts"),
        ({}, "replay,wide --methods.wide.data.replay 0.5", "stages beside each other.* in style"),
        (
            {},
            "base,on --methods.on.preset one_lora --methods.on.data.replay 0.5",
            "no rows of earlier stages.* style",
        ),
        ({"quantize": "int8"}, "combine,mean --chain.hold carried", "adds to the weights"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_cell(
    chainlora, stages, tmp_path, keys, methods, said
):
    words = ["--seeds", "2", "--backend", "inline", "--output", tmp_path / "out"]
    config = stages(**keys)
    if keys.get("train"):
        pairs = [{"prompt": "the cat", "chosen": " yes", "rejected": " no"}] * 4
        for name in ("facts", "facts-held-out", "style", "style-held-out"):
            write_rows(tmp_path / f"{name}.jsonl", pairs)
    shown = chainlora("compare", config, "--methods", *methods.split(), *words)
    assert shown.status != 0
    assert not (tmp_path / "out" / "cells").exists()
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        raise AssertionError(shown.err)


def test_a_cell_is_named_by_the_rows_of_all_stages_and_of_the_start(stages, tmp_path):
    """Whether a file is named, one of a list, or a folder: old cells stood for new rows."""
    general = write_rows(tmp_path / "general.jsonl", [{"text": "the cat"}])
    (tmp_path / "held").mkdir()
    held = write_rows(tmp_path / "held" / "validation.jsonl", [{"text": "the cat"}])
    start = {"train": [str(general)], "validation": str(held.parent)}
    config = yaml.safe_load(stages(start_data=start).read_text())

    def named() -> str:
        return expand(comparison(config, ["combine", "base"], [0]))[0].id

    seen = {named()}
    for file in (general, held, tmp_path / "style.jsonl"):
        with file.open("a") as rows:
            rows.write('{"prompt": "two", "completion": " no", "text": "two"}\n')
        seen.add(named())
    assert len(seen) == 4


def test_every_way_of_the_package_has_a_preset():
    ways = {**COMBINERS, **REGULARISERS, **WAYS}
    # plug-ins of other tests add theirs
    ways = {name for name, way in ways.items() if way.__module__.startswith("chainlora_lab")}
    assert ways <= shipped_ways()


def test_a_plug_in_cannot_replace_a_way(chainlora, stages, tmp_path, monkeypatch):
    monkeypatch.setitem(COMBINERS, "mean", COMBINERS["mean"])  # put back afterwards
    (tmp_path / "mine.py").write_text(
        "from chainlora_lab.ways import COMBINERS\n\n"
        "shipped = COMBINERS['mean']\n"
        "def mean(*given):\n    return shipped(*given)\n\n"
        "COMBINERS['mean'] = mean\n"
    )
    words = ["--methods", "combine,mean", "--plugins", tmp_path / "mine.py", "--seeds", "2"]
    shown = chainlora("compare", stages(), *words, "--output", tmp_path / "out")
    assert shown.status == 1
    assert "a plug-in cannot replace a way of chainlora (got mean" in shown.err
    assert not (tmp_path / "out" / "cells").exists()


def test_a_way_needs_stages(base, sentiment):
    base |= {"chain": {"ranks": [2], "steps": [2]}}
    del base["recipe"]
    base["data"] |= {"task": str(sentiment / "task.yaml")}
    with pytest.raises(ConfigError, match="replay is a way to add data sets, and needs a config"):
        expand(comparison(make_config(base), ["lora", "replay"], [0, 1]))


def test_a_metric_that_a_sequence_has_no_score_of_is_refused(stages, sentiment):
    """Its stages share one metric, or it is scored by the loss."""
    config = yaml.safe_load(stages().read_text())
    tree = {"name": "tuned", "base": config, "tasks": {"both": {}}, "methods": ["ewc"]}
    tune = {"grid": {"settings.penalty": [1.0, 10.0]}, "metric": "perplexity"}
    said = r"both: a sequence is scored by loss alone \(got `tune.metric: perplexity`\); give loss"
    with pytest.raises(ConfigError, match=said):
        expand(make_experiment(tree | {"tune": tune}))
    for stage in config["stages"]:
        stage["data"] = dict.fromkeys(("train", "validation", "test"), f"{sentiment}/train.jsonl")
        stage["data"]["task"] = str(sentiment / "task.yaml")
    with pytest.raises(ConfigError, match=r"by accuracy alone .*: loss"):
        expand(make_experiment(tree | {"tune": tune | {"metric": "loss"}}))
    assert expand(make_experiment(tree | {"tune": tune | {"metric": "accuracy"}}))


def test_settings_and_keys_of_a_way_have_grids(stages):
    """And keys of a method hold for all stages, but for a replay before there are rows."""
    config = yaml.safe_load(stages().read_text())
    methods = {
        "ewc": {"grid": {"settings.penalty": [1.0, 10.0]}},
        "replay": {"data": {"replay": 0.25}, "chain": {"ranks": [4]}},
    }
    cells = expand(comparison(config, methods, [0]))
    tuned = [cell.config.settings["penalty"] for cell in cells if cell.method == "ewc"]
    assert tuned == [1.0, 10.0]
    for stage in config["stages"]:
        stage["data"]["test"] = stage["data"]["validation"]
    rated = expand(comparison(config, methods, [0], learning_rates=[1e-2, 1e-3]))
    tuned = [c for c in rated if c.method == "ewc" and c.point]
    penalties = [(c.config.settings["penalty"], c.config.train.lr) for c in tuned]
    assert penalties == [(p, lr) for lr in (1e-2, 1e-3) for p in (1.0, 10.0)]  # rates were ignored
    (replay,) = (cell.config for cell in cells if cell.method == "replay")
    assert [part.data.replay for part in replay.parts] == [None, 0.25]
    assert [part.chain.ranks for part in replay.parts] == [(4,), (4,)]
    orders = {"ab": {"stages": config.pop("stages")}}
    orders["ba"] = {"stages": orders["ab"]["stages"][::-1]}
    tree = {"name": "orders", "base": config, "tasks": orders, "methods": ["ewc"], "seeds": [0]}
    cells += (both := expand(make_experiment(tree)))
    assert [[name for name, _ in cell.config.stages] for cell in both] == [
        ["facts", "style"],
        ["style", "facts"],
    ]
    assert len({cell.id for cell in cells}) == len(cells)
    assert json.loads(replay.model_dump_json(exclude_defaults=True))["stages"][1][0] == "style"


def test_stages_without_a_shared_split_are_refused(stages):
    """Their means were taken of nothing, after all of them had been trained."""
    config = yaml.safe_load(stages().read_text())
    data = config["stages"][1]["data"]
    data["test"] = data.pop("validation")
    with pytest.raises(ConfigError, match="stages of a sequence are scored on the same split"):
        expand(comparison(config, ["combine", "base"], [0]))


def test_all_at_once_reads_as_many_rows_as_stages_of_default_lengths(stages, tmp_path):
    """It had the default length of the joined rows: one epoch of 1,380."""
    config = yaml.safe_load(stages(chain={"ranks": [2]}).read_text())
    for name, count in {"facts": 100, "style": 1280}.items():  # 13 epochs and one
        row = {"prompt": f"the {name}", "completion": " yes"}
        write_rows(tmp_path / f"{name}.jsonl", [row] * count)
    cell, _ = expand(comparison(config, ["all_at_once", "base"], [0]))
    (epochs,) = _of_all(Case(cell.config)).chain.epochs
    assert epochs * 1380 == pytest.approx(13 * 100 + 1280)
