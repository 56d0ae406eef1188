"""The verbs that measure, by the command line."""

from __future__ import annotations

from pathlib import Path

import yaml


def test_an_experiment_from_the_command_line(chainlora, tiny_folder, sentiment, tmp_path):
    file, out = tmp_path / "experiment.yaml", tmp_path / "out"
    base = {
        "model": str(tiny_folder),
        "recipe": {"rank": 2, "steps": 3},
        "data": {"num_validation": 8},
        "chain": {"target_modules": ["q_proj"]},
        "train": {"batch_size": 8},
    }
    mood = {"data": {"task": str(sentiment / "task.yaml"), "dir": str(sentiment)}}
    tasks = {"mood": mood, "rte": {"data": {"dir": str(tmp_path)}}}
    keys = {"name": "small", "methods": ["lora", "chain3"], "seeds": [0, 1]}
    file.write_text(yaml.safe_dump(keys | {"base": base, "tasks": tasks}))
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


def test_compare_from_the_command_line(chainlora, config, tmp_path):
    two = f"compare {config} --methods lora,chain2 --seeds 2 --backend inline --output {tmp_path}"
    outcome = chainlora(f"{two}/out")
    assert outcome.status == 0, outcome.err
    assert "too few pairs to compare chain2 with lora" in outcome.out  # two seeds decide nothing
    assert (tmp_path / "out" / "report.md").read_text() == outcome.out.removesuffix("\n")
    assert outcome.err.endswith(f"report: {tmp_path}/out/report.html\n")
    chainlora(f"{two}/o --learning-rates 1e-3,1e-2").refused("got no data.test")
    chainlora(f"{two}/o --train.lrr 1").refused("did you mean 'lr'")  # keys as `train` takes them
    chainlora(f"experiment plan {config}").refused("one run); chainlora compare ")
    other = f"compare {config} --output {tmp_path}/o --methods"
    chainlora(f"{other} chane2").refused("did you mean 'chain2'")
    chainlora(f"{other} lora,lora").refused("`compare` needs two methods")
    chainlora(f"{other} lora,mine.yaml").refused(
        "got the file 'mine.yaml'", "`methods` of an experiment file"
    )
    assert not (tmp_path / "o").exists()
