"""The verbs that measure, by the command line."""

from __future__ import annotations

from pathlib import Path

import yaml


def test_an_experiment_from_the_command_line(chainlora, tiny_folder, sentiment, tmp_path):
    file, out = tmp_path / "experiment.yaml", tmp_path / "out"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "small",
                "base": {
                    "model": str(tiny_folder),
                    "recipe": {"rank": 2, "steps": 3},
                    "data": {"num_validation": 8},
                    "chain": {"target_modules": ["q_proj"]},
                    "train": {"batch_size": 8},
                },
                "tasks": {
                    "mood": {"data": {"task": str(sentiment / "task.yaml"), "dir": str(sentiment)}},
                    "rte": {"data": {"dir": str(tmp_path)}},
                },
                "methods": ["lora", "chain3"],
                "seeds": [0, 1],
            }
        )
    )
    run = (
        "experiment",
        "run",
        "--seeds",
        "[0]",
        file,
        "--output",
        out,
        "--backend",
        "inline",
    )  # a key before the file
    chainlora(*run).refused("'rte' needs its 'train' rows", "or leave the folder out")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"premise": "It rains."}\n' * 2000)
    outcome = chainlora(*run)
    assert (outcome.status, outcome.out) == (
        1,
        "",
    )  # a failed cell: the others went on, and the end says so
    assert "mood chain3 seed=0: accuracy " in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith(
        "chainlora: error: every cell must end (got 2 of 4 failed, first rte lora seed=0: "
    )
    found = chainlora(*run, "--tasks", "[mood]", "--json")
    assert found.json["run"] == 0  # what was done is not done again
    report = chainlora("experiment", "report", out)
    assert report.status == 0
    assert report.out.startswith("# small: mood\n")
    assert "| mood | chain3 − lora | 1 |" in report.out
    files = chainlora("experiment", "report", out, "--output", tmp_path / "report", "--json").json[
        "files"
    ]
    assert {"report.md", "scores.png", "scores.tex"} <= {Path(name).name for name in files}
    again = ("experiment", "run", file, "--output", out)
    chainlora(*again, "--methods", "[lara]").refused("'lara'", "did you mean 'lora'")
    chainlora(*again, "--taks", "[rte]").refused("taks", "did you mean 'tasks'")
    chainlora("experiment", "report", tmp_path).refused("results file must be readable")
    assert chainlora("experiment", "run", "--output", out).status == 2


def test_compare_from_the_command_line(chainlora, config, tmp_path):
    arguments = (
        "compare",
        config,
        "--methods",
        "lora,chain2",
        "--seeds",
        "2",
        "--backend",
        "inline",
    )
    outcome = chainlora(*arguments, "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "too few pairs to compare chain2 with lora" in outcome.out  # two seeds decide nothing
    assert (tmp_path / "out" / "report.md").read_text() == outcome.out.removesuffix("\n")
    chainlora(*arguments, "--output", tmp_path / "o", "--learning-rates", "1e-3,1e-2").refused(
        "got no data.test"
    )
    chainlora("compare", config, "--methods", "chane2", "--output", tmp_path / "o").refused(
        "did you mean 'chain2'"
    )
    chainlora("compare", config, "--methods", "lora,mine.yaml", "--output", tmp_path / "o").refused(
        "got the file 'mine.yaml'", "`methods` of an experiment file"
    )
    assert not (tmp_path / "o").exists()
