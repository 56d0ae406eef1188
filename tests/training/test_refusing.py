"""What a stage cannot be is refused in a line, before any is trained."""

from __future__ import annotations

import json

import pytest
from accelerate.utils import LoggerType
from conftest import write_rows
from helpers import Stop, sign, train_all, train_on
from helpers_data import pair_files
from helpers_stages import files_of, stage_of, stopping_after, survey

from chainlora import train
from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.files import sha256
from chainlora.runs.changes import undo
from chainlora.training import refusing
from chainlora.training.plan import make_plan
from chainlora.training.stages import extension

CHAIN = {"ranks": [2], "steps": [1]}
GOOD = {"data": {"train": "good.jsonl"}, "chain": CHAIN}
PAIRS = {"data": {"train": "pairs.jsonl"}, "train": {"loss": "dpo", "lr": 1e-3}}
BESIDE = {"beside": True}
# Changes of a config of two stages, and what must be said. Keys of `data` are added to its own.
CONFIGS = [
    ({"style": {"name": "facts"}}, "the names of stages must be different"),
    ({"style": {"name": "x²"}}, "must have a `name`"),
    ({"style": {"name": "base"}}, "not base, start, now or combined"),
    ({"style": {"model": "m"}}, "can set only its name, data, chain and train", "`model`"),
    ({"style": {"besides": False}}, "unknown key `besides`", "'beside'"),
    ({"style": {"data": {"chat_template": "chatml"}}}, "`data.chat_template` must be the same"),
    ({"style": {"chain": {"hold": "carried"}}}, "`chain.hold` must be the same"),
    ({"style": {"train": {"seed": 3}}}, "`train.seed` must be the same"),
    ({"style": {"train": {"lrr": 3}}}, "stage 'style': unknown key `train.lrr`"),
    *(({"stages": stages}, "stage") for stages in ([], {}, "facts", None, [3])),
    *(({key: 5}, f"`{key}` must be a") for key in ("data", "chain", "train")),
    ({"style": GOOD | {"data": {"train": "bad.jsonl"}}}, "stage 'style': ", "bad.jsonl"),
    ({"style": GOOD | {"chain": {"ranks": [2], "epochs": [0.1]}}}, "stage 'style': "),
    ({"style": GOOD | {"data": {"train": "good.jsonl", "max_length": 3}}}, "stage 'style': "),
    ({"style": GOOD | {"data": {"train": "good.jsonl", "validation": 0.001}}}, "stage 'style': "),
    ({"style": {"data": {"train": "none.jsonl"}}}, "stage 'style': ", "none.jsonl"),
    ({"style": {"chain": CHAIN | {"target_modules": ["q_pro"]}}}, "'q_pro'", "candidates"),
    ({"style": {"data": {"max_length": 10_000}}}, "stage 'style': ", "fit the model's context"),
    ({"style": {"train": {"optimizer": "adamm"}}}, "`train.optimizer` must name a class"),
    ({"style": {"chain": CHAIN | {"knots": {"policy": "space", "every": 1}}}}, "policy` must be"),
    ({"style": PAIRS | {"data": {"train": "good.jsonl"}}}, "stage 'style': ", "chosen"),
    ({"facts": {"data": {"replay": 0.1}}}, "stage 'facts' ", "no earlier stage"),
    ({"facts": {"data": {"replay": 0.1}}, "style": None}, "0.1 in a run without earlier stages"),
    ({"style": PAIRS | {"data": {"train": "pairs.jsonl", "replay": 0.1}}}, "learned by dpo"),
    (
        {"facts": {"data": {"keep_rows": False}}, "style": {"data": {"replay": 0.1}}},
        "none of facts",
        "set data.replay: null",
    ),
    (
        {"facts": {"data": {"keep_rows": False}}, "style": {"data": {"new_rows_only": True}}},
        "none of facts",
        "set data.new_rows_only: false",
    ),
    ({"facts": BESIDE}, "beside: true"),
    ({"style": {"beside": "yes"}}, "`beside` must be true or false"),
    ({"style": {"rehearse": True}}, "chainlora combine RUN --steps 60"),
    ({"style": BESIDE | {"chain": CHAIN | {"lora_bias": True}}}, "chain.lora_bias of style"),
    ({"facts": {"data": {"keep_rows": False}}, "style": BESIDE}, "keep_rows: false of facts"),
    ({"style": BESIDE | {"data": {"new_rows_only": True}}}, "none below", "beside the others"),
]
# The same of a stage that is added to a trained run, at an address of it.
STAGES = [
    ("", {"model": "m"}, "can set only its name, data, chain and train"),
    ("", {"train": {"seed": 1}}, "`train.seed` ", "`extend` takes it from the run"),
    ("", {"name": "facts"}, "stage 'facts': "),
    ("", {"chain": {"ranks": [4]}}, "stage 'style'"),
    ("", {"chain": {"ranks": [4], "steps": [1]}}, "it began with", "stage 'style': chain.ranks"),
    ("@nope", {"name": "law", "output": "x"}, "one of facts, style"),
    ("@facts", {"name": "z", "output": "run/stages/z"}, "must lie outside other runs"),
    ("", PAIRS | {"name": "law", "data": {"train": "pairs.jsonl", "replay": 0.1}}, "by dpo"),
    (
        "",
        PAIRS | {"name": "law", "data": {"train": "pairs.jsonl", "replay": 0.1}, "output": "x"},
        "learned by dpo (got facts: candidates, style: candidates",
    ),
]


@pytest.fixture
def rows(tmp_path) -> None:
    """Files of rows in the current folder."""
    good = [{"prompt": f"the {n}", "completion": " cat"} for n in range(6)]
    write_rows(tmp_path / "good.jsonl", good)
    write_rows(tmp_path / "bad.jsonl", [*good, {"prompt": "the", "completion": 4}])
    pair_files(tmp_path)


def changed(section: dict, change: dict) -> dict:
    """A stage with other keys: of its data, one by one, if its rows stay."""
    data = change.get("data", {})
    data = data if "train" in data else section["data"] | data
    return section | change | {"data": data}


@pytest.mark.parametrize(("change", "words"), [(each[0], each[1:]) for each in CONFIGS], ids=str)
def test_what_stages_cannot_be_is_refused_before_the_first_is_trained(
    change, words, staged, rows, tmp_path
):
    stages = {stage["name"]: stage for stage in staged["stages"]}
    if len(change) == 2 and change["style"] is None:  # no stages at all
        facts = changed(stages["facts"], change["facts"])
        tree = {key: value for key, value in staged.items() if key != "stages"} | facts
        del tree["name"]
    else:
        own = [changed(stage, change.get(name, {})) for name, stage in stages.items()]
        whole = {key: value for key, value in change.items() if key not in stages}
        tree = staged | {"stages": own} | whole
    with pytest.raises(ChainLoRAError) as raised:
        train(tree)
    said(str(raised.value), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"), [(*each[:2], each[2:]) for each in STAGES], ids=str
)
def test_what_a_new_stage_cannot_be_is_refused(name, change, words, two, rows, tmp_path):
    before = files_of(tmp_path / "run")
    with pytest.raises(ChainLoRAError) as raised:
        train_on(f"{tmp_path / 'run'}{name}", changed(stage_of(two, "style"), change))
    said(str(raised.value), words)
    assert files_of(tmp_path / "run") == before


def said(error: str, words: tuple[str, ...]) -> None:
    assert "\n" not in error
    for word in words:
        assert word in error


def test_answers_are_learned_beside_candidates(two, rows, tmp_path):
    answers = changed(stage_of(two, "style"), {"data": {"train": "good.jsonl", "replay": 0.1}})
    assert survey(extension(tmp_path / "run", answers | {"name": "law"}))[-1].state == "new"


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
