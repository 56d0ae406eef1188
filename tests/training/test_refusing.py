"""What a stage cannot be is refused in a line, before any is trained."""

from __future__ import annotations

import json

import pytest
from accelerate.utils import LoggerType
from helpers import Stop, sign, train_all, train_on
from helpers_stages import files_of, stage_of, stopping_after, survey

from chainlora import train
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.files import sha256
from chainlora.runs.changes import undo
from chainlora.training import refusing
from chainlora.training.plan import make_plan

STYLE = [  # changes of the second stage, each with its error
    ({"name": "facts"}, "the names of stages must be different"),
    ({"name": "x²"}, "must have a `name`"),
    ({"name": "base"}, "not base, start, now or combined"),
    ({"model": "m"}, "can set only its name, data, chain and train .*`model`"),
    ({"besides": False}, "unknown key `besides`; did you mean 'beside'"),
    ({"data": {"chat_template": "chatml"}}, "`data.chat_template` must be the same"),
    ({"chain": {"hold": "carried"}}, "`chain.hold` must be the same"),
    ({"train": {"seed": 3}}, "`train.seed` must be the same"),
    ({"train": {"lrr": 3}}, "stage 'style': unknown key `train.lrr`"),
    (
        {"data": {"task": "sst2"}, "chain": {"ranks": [2]}},
        "stage 'style': `chain` must set the length",
    ),
]
WHOLE = [({"stages": stages}, "stage") for stages in ([], {}, "facts", None, [3])]
WHOLE += [({key: 5}, f"`{key}` must be a") for key in ("data", "chain", "train")]


def test_what_a_config_of_stages_cannot_say_is_refused_in_a_line(staged):
    facts, style = staged["stages"]
    changes = [({"stages": [facts, style | change]}, message) for change, message in STYLE]
    for change, message in [*changes, *WHOLE]:
        with pytest.raises(ConfigError, match=message) as raised:
            train(staged | change)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["row", "length", "context", "held out"])
def test_rows_of_a_later_stage_are_refused_before_the_first_is_trained(staged, tmp_path, wrong):
    rows = [{"prompt": f"the {n}", "completion": " cat"} for n in range(6)]
    rows += [{"prompt": "the", "completion": 4}] if wrong == "row" else []
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    style = {"name": "style", "data": {"train": str(path)}, "chain": {"ranks": [2], "steps": [1]}}
    if wrong == "length":
        style["chain"] = {"ranks": [2, 2], "epochs": [0.1, 0.1]}
    more = {"context": {"max_length": 3}, "held out": {"validation": 0.001}}
    style["data"] |= more.get(wrong, {})
    both = staged | {"stages": [staged["stages"][0], style]}
    for check in (lambda tree: make_plan(make_stages(tree)), train):
        with pytest.raises(ChainLoRAError, match="stage 'style': "):
            check(both)
    assert not (tmp_path / "run").exists()


def test_run_wide_keys_of_an_extension_and_stages_that_are_not_there_are_refused(two, tmp_path):
    run, style = tmp_path / "run", stage_of(two, "style")
    before, chain = files_of(run), {"ranks": [4], "steps": [1]}
    for address, change, message in (
        (run, {"model": "m"}, "can set only its name, data, chain and train"),
        (run, {"train": {"seed": 1}}, "`train.seed` .*`extend` takes it from the run"),
        (run, {"name": "facts"}, "stage 'facts': "),
        (run, {"chain": {"ranks": [4]}}, "stage 'style'"),
        (run, {"chain": chain}, r"it began with \(got stage 'style': chain.ranks"),
        (f"{run}@nope", {"name": "law", "output": str(tmp_path / "x")}, "one of facts, style"),
    ):
        with pytest.raises(ChainLoRAError, match=message):
            train_on(address, style | change)
    assert files_of(run) == before


def test_a_stage_that_cannot_be_trained_is_refused_before_the_stages_before_it(staged, tmp_path):
    staged["stages"][1]["data"] |= {"train": str(tmp_path / "none.jsonl")}
    with pytest.raises(ChainLoRAError, match=r"stage 'style': .*none.jsonl"):
        train_all(staged)
    assert not (tmp_path / "run").exists()
    style, data = staged["stages"][1], staged["stages"][0]["data"]
    for change, message in (
        ({"chain": style["chain"] | {"target_modules": ["q_pro"]}}, "got .'q_pro'.*; candidates"),
        ({"data": data | {"max_length": 10_000}}, "must fit the model's context"),
        ({"train": {"optimizer": "adamm"}}, "`train.optimizer` must name a class"),
        ({"chain": style["chain"] | {"knots": {"policy": "space", "every": 1}}}, "policy` must be"),
    ):
        tree = staged | {"stages": [staged["stages"][0], style | {"data": data} | change]}
        with pytest.raises(ChainLoRAError, match=f"stage 'style': .*{message}"):
            train_all(tree)
    assert not (tmp_path / "run").exists()
    (tmp_path / "none.jsonl").write_text('{"text": "no pair"}\n')
    staged["stages"][1]["data"] = {"train": str(tmp_path / "none.jsonl")}
    staged["stages"][1]["train"] = {"loss": "dpo", "lr": 1e-3}
    with pytest.raises(ChainLoRAError, match=r"stage 'style': .*chosen"):
        train_all(staged)
    assert not (tmp_path / "run").exists()


def test_a_fork_inside_a_run_is_refused(two, tmp_path, capsys):
    """Its parent took it for a stage of its own."""
    run, before = tmp_path / "run", files_of(tmp_path / "run")
    keys = ["--name", "z", "--chain.ranks", "2", "--chain.steps", "1", "--data.train", "x"]
    assert cli(["extend", f"{run}@facts", *keys, "--output", str(run / "stages/z")]) == 1
    assert f"must lie outside other runs (got {run / 'stages/z'}, " in capsys.readouterr().err
    assert files_of(run) == before


def test_a_config_goes_on_where_its_stages_are(two, tmp_path, capsys):
    """A stage that was undone is not below the next one: that is refused, with what to do."""
    run, law = tmp_path / "run", stage_of(two, "style") | {"name": "law"}
    two["stages"].append(law)
    undo(run)
    with pytest.raises(RunError, match=rf"include style. Run chainlora undo {run} --to style,"):
        make_plan(make_stages(two))
    undo(run, to="style")
    assert [each.state for each in survey(make_stages(two))] == ["finished", "finished", "new"]


def test_a_received_run_names_no_trackers(two, tmp_path, chainlora, caplog):
    """They send what a run logs to services, as whoever is logged in there."""
    run, words = tmp_path / "run", f"--chain.ranks [1] --chain.steps [1] --output {tmp_path}/own"
    for path in (run / "stages").glob("*/config.yaml"):
        path.write_text(path.read_text().replace("trackers: []", "trackers: [nobody]"))
    sign(run)
    config = run / "stages/facts/config.yaml"
    done = chainlora(f"train {config} {words}")
    assert done.status == 0, done.err
    assert "ignored unless you name them again: --train.trackers '[nobody]'" in caplog.text
    chainlora(f"train {config} {words}2 --train.trackers [nobody]").refused("`trackers` must name")
    (tmp_path / "law.yaml").write_text(json.dumps(stage_of(two, "style") | {"name": "law"}))
    done = chainlora(f"extend {run} {tmp_path}/law.yaml")
    assert done.status == 0, done.err
    assert "stage law does not inherit train.trackers from" in caplog.text


LINKED = ("links", "rows", "stages", "stages/style", "stages/law")
LINKED_FILES = (".lock", "stages/style/metrics.jsonl", "chain.png")


@pytest.mark.parametrize("name", [*LINKED, *LINKED_FILES])
def test_a_received_run_changes_nothing_outside_itself(two, tmp_path, chainlora, name):
    """Every command refuses a symbolic link in place of a folder. A file that is a link is
    replaced, not followed; a lock is refused."""
    run, outside, config = tmp_path / "run", tmp_path / "outside", tmp_path / "config.yaml"
    if (run / name).exists():
        (run / name).rename(outside)
    elif name in LINKED_FILES:
        outside.write_text("mine")
    else:
        (outside / "00000001.1-2.new").mkdir(parents=True)
        (outside / "00000001").write_text("mine")
    (run / name).symlink_to(outside)
    before = sha256(outside) if outside.is_file() else sorted(outside.rglob("*"))
    law = stage_of(two, "style") | {"name": "law"}
    config.write_text(json.dumps(two | {"stages": [*two["stages"], law]}))
    (tmp_path / "law.yaml").write_text(json.dumps(law))
    for words in (
        f"prune {run} style",
        f"prune {run} style --yes",
        f"undo {run}",
        f"extend {run} {tmp_path / 'law.yaml'}",
        f"train {config}",
    ):
        done = chainlora(words)
        if name in LINKED:
            done.refused(f"a run must hold no symbolic links (got {run / name} ->")
    assert chainlora(f"inspect {run}").status == (name in LINKED)
    assert before == (sha256(outside) if outside.is_file() else sorted(outside.rglob("*")))


def test_records_that_are_a_link_are_not_appended_to(staged, tmp_path):
    staged["train"]["save_every"] = 1
    with pytest.raises(Stop):
        train_all(staged, listener=stopping_after(8))
    path, outside = tmp_path / "run/stages/style/metrics.jsonl", tmp_path / "outside"
    before = b"".join(path.read_bytes().splitlines(keepends=True)[:-1])  # as of the checkpoint
    outside.write_bytes(before)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(RunError, match=r"must hold no symbolic links .*metrics\.jsonl"):
        train_all(staged)
    assert outside.read_bytes() == before


def test_an_installed_tracker_is_accepted(staged, tmp_path, monkeypatch):
    """Accelerate lists members of an enum, which equal no name."""
    stages = make_stages(staged | {"train": staged["train"] | {"trackers": ["tensorboard"]}})
    monkeypatch.setattr(refusing, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    assert len(make_plan(stages).due) == 2
    monkeypatch.setattr(refusing, "get_available_trackers", list)
    with pytest.raises(ConfigError, match="packages are installed"):
        make_plan(stages)
