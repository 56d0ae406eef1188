"""Stages: one chain over several data sets, the same bits however it is told, each undoable."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from contextlib import nullcontext
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from helpers import Stop, assert_same_links, links_of, settings, stop_after
from helpers_data import pair_files
from transformers import AutoModelForCausalLM

from chainlora import evaluate_task, export_adapter, load_chain, load_run, make_config, train
from chainlora.cli.common import words_and_overrides
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError, ConfigError, RunError, StoppedError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.evaluation.strengths import best_mix
from chainlora.files import checksums, sha256
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import mix_stages, prune_stage, redo, undo
from chainlora.runs.inspection import inspect_run
from chainlora.runs.loading_start import load_start
from chainlora.training.interrupts import interruptible
from chainlora.training.loop import train as train_run
from chainlora.training.plan import make_plan
from chainlora.training.stages import extension, train_stages


def two_stages(tiny_folder: Path, sentiment: Path, folder: Path) -> dict:
    """Return a config of two stages: three links on all rows, two on rows of another order."""
    sentiment = shutil.copytree(sentiment, folder / "rows")
    rows = (sentiment / "train.jsonl").read_text().splitlines()
    (folder / "more.jsonl").write_text("\n".join(rows[::-1][:12]) + "\n")
    shared = settings(tiny_folder, sentiment, folder / "run")
    facts = {"ranks": [4, 4, 2], "steps": [2, 2, 2]}
    style = {"ranks": [2, 2], "steps": [2, 3]}
    shared["chain"] = {"alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    data = shared.pop("data")
    more = data | {"train": str(folder / "more.jsonl")}
    shared["stages"] = [
        {"name": "facts", "chain": facts, "data": data},
        {"name": "style", "chain": style, "data": more},
    ]
    return shared


@pytest.fixture
def config(tiny_folder, sentiment, tmp_path) -> dict:
    """A config of two stages, whose run will be tmp_path/run."""
    return two_stages(tiny_folder, sentiment, tmp_path)


@pytest.fixture(scope="module")
def trained_once(tiny_folder, sentiment, tmp_path_factory) -> dict[str, dict]:
    """The config of two stages, and of three: facts (links 0 to 2), style (3, 4), law (5, 6); the
    runs are trained."""
    configs = {}
    for name in ("two", "three"):
        config = two_stages(tiny_folder, sentiment, tmp_path_factory.mktemp(name))
        if name == "three":
            law = stage_of(config, "style") | {"name": "law"}
            law["data"] = stage_of(config, "facts")["data"] | {"num_train": 20}
            config["stages"].append(law)
            config["stages"][1]["train"] = {"eval_every": 1, "keep_best": True}
        train_stages(make_stages(config))
        configs[name] = config
    return configs


@pytest.fixture
def two(trained_once, tmp_path) -> dict:
    """The config of two stages and, in tmp_path/run, a copy of its trained run."""
    return copied(trained_once["two"], tmp_path)


@pytest.fixture
def three(trained_once, tmp_path) -> dict:
    """The config of three stages and, in tmp_path/run, a copy of its trained run."""
    return copied(trained_once["three"], tmp_path)


def copied(config: dict, folder: Path) -> dict:
    shutil.copytree(config["output"], folder / "run")
    return deepcopy(config) | {"output": str(folder / "run")}


def stage_of(config: dict, name: str) -> dict:
    return next(stage for stage in config["stages"] if stage["name"] == name)


def one_stage(config: dict) -> dict:
    return config | {"stages": config["stages"][:1]}


def logits(run, **keys) -> torch.Tensor:
    model, tokenizer = load_run(run, **keys)
    return model(**tokenizer("a fine film", return_tensors="pt")).logits.detach()


def survey(stages) -> list:
    """Where each stage of a plan is."""
    return list(make_plan(stages).stages)


def files_of(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in checksums(run).items() if not name.endswith(".lock")}


def test_extending_a_run_gives_the_bits_of_one_config_with_both_stages(config, tmp_path):
    train_stages(make_stages(config))
    later = one_stage(config) | {"output": str(tmp_path / "later")}
    train_stages(make_stages(later))
    before = files_of(tmp_path / "later")
    train_stages(extension(tmp_path / "later", stage_of(config, "style")))
    assert_same_links(tmp_path / "run", tmp_path / "later")
    after = files_of(tmp_path / "later")
    assert [name for name in before if after[name] != before[name]] == ["history.json"]
    assert len(links_of(tmp_path / "run")) == 5
    ends = [open_run(tmp_path / name).state.digest for name in ("run", "later")]
    assert ends[0] == ends[1]


def test_the_same_call_again_trains_what_is_new(config, tmp_path):
    assert [r is None for r in train_stages(make_stages(one_stage(config)))] == [False]
    assert [r is None for r in train_stages(make_stages(config))] == [True, False]
    before = files_of(tmp_path / "run")
    (tmp_path / "more.jsonl").write_text("no row\n")  # a file that has changed since
    assert train_stages(make_stages(config)) == [None, None]
    assert files_of(tmp_path / "run") == before
    assert [stage.state for stage in survey(make_stages(config))] == ["finished", "finished"]


def test_a_stage_stays_what_it_was(config):
    train_stages(make_stages(one_stage(config)))
    config["stages"][0]["chain"]["steps"] = [2, 2, 3]
    with pytest.raises(RunError, match=r"stage 'facts': chain.steps.*a new name"):
        train_stages(make_stages(config))
    config["stages"][0] = config["stages"][0] | {"name": "other"}
    with pytest.raises(RunError, match="in their order"):
        train_stages(make_stages(config))


def test_an_ended_stage_is_known_by_content_wherever_things_lie(two, tmp_path, monkeypatch):
    """Its rows, and the state that its run began on; of two rates that it had, each is its own."""
    run, more = tmp_path / "run", Path(stage_of(two, "style")["data"]["train"])
    shutil.copy(more, tmp_path / "renamed.jsonl")
    shutil.copy(more, tmp_path / "grown.jsonl")
    with open(tmp_path / "grown.jsonl", "a") as file:
        file.write('{"text": "one more", "label": 0}\n')
    monkeypatch.chdir(tmp_path)
    for name, message in (
        (os.path.relpath(more), ""),
        ("renamed.jsonl", ""),
        (
            "grown.jsonl",
            r"stage 'style': data.train is grown.jsonl, .* by content\); .*new name",
        ),
    ):
        stage_of(two, "style")["data"]["train"] = name
        with pytest.raises(RunError, match=message) if message else nullcontext():
            assert train_stages(make_stages(two | {"output": "run"})) == [None, None]
    law = stage_of(two, "style") | {"name": "law"}
    law |= {"data": law["data"] | {"train": str(more)}, "train": {"lr": 0.01, "save_every": 1}}
    fork = {"start": f"{run}@facts", "output": "fork", "stages": [law]}
    with pytest.raises(Stop):
        train(fork, listener=_stop_after(1))
    law["train"]["lr"] = 1e-3
    train(fork, change=["train.lr"])
    for rate in (0.01, 1e-3):
        law["train"]["lr"] = rate
        train(fork)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs/moved")
    train(fork | {"start": "runs/moved@facts"})
    with pytest.raises(ConfigError, match=r"must be what the run began on \(got runs/moved@style"):
        train(fork | {"start": "runs/moved@style"})


def test_keys_of_all_stages_and_of_one():
    """A key without effect is refused; keys of an objective reach the stages that have it."""
    chain = {"ranks": [2], "epochs": [1]}
    first = {"name": "first", "data": {"train": "x"}, "chain": chain, "train": {"lr": 0.5}}
    second = first | {"name": "second-one", "train": {"loss": "dpo"}}
    tree = {"model": "m", "output": "o", "train": {"dpo_beta": 0.3}, "stages": [first, second]}
    _, named = words_and_overrides(["--stages.second-one.train.log-every", "7"])
    trains = [stage.config.train for stage in make_stages(tree, named)]
    assert [(each.dpo_beta, each.log_every) for each in trains] == [(0.1, None), (0.3, 7)]
    with pytest.raises(ConfigError, match=r"`train.orpo_beta` needs loss: orpo .got no stage"):
        make_stages(tree | {"train": {"orpo_beta": 0.3}})
    shared = {"every": 10}  # as an alias of YAML is
    knots = [each | {"chain": chain | {"knots": shared}} for each in (first, second)]
    key = "stages.first.chain.knots.every"
    chains = [stage.config.chain for stage in make_stages(tree | {"stages": knots}, [(key, "5")])]
    assert [each.knots.every for each in chains] == [5, 10]
    assert shared == {"every": 10}
    for key, hidden in {"train.lr": "train.lr", "chain.steps": "chain.epochs"}.items():
        with pytest.raises(ConfigError, match=rf"got `stages.first.{hidden}` .* set stages.first"):
            make_stages(tree, [(key, "5")])


def test_a_fork_leaves_its_parent_alone(two, tmp_path):
    before, parent = files_of(tmp_path / "run"), tmp_path / "run"
    own = stage_of(two, "style") | {"name": "law", "output": str(tmp_path / "fork")}
    for _ in range(2):  # the second time, nothing is new
        train_stages(extension(f"{parent}@facts", own))
    assert files_of(parent) == before
    assert open_run(tmp_path / "fork").stages == ["facts", "law"]
    assert "style" not in (tmp_path / "fork/history.json").read_text()  # what the state needs alone
    shutil.rmtree(parent)
    config = _only(tmp_path / "fork", two, own)
    train_stages(make_stages(config | {"start": f"{parent}@facts"}))  # it is not needed any more
    assert not torch.equal(logits(tmp_path / "fork"), logits(tmp_path / "fork", num_links=3))


def _only(fork: Path, config: dict, own: dict) -> dict:
    stage = {key: value for key, value in own.items() if key != "output"}
    shared = {key: value for key, value in config.items() if key != "stages"}
    return shared | {"output": str(fork), "stages": [stage]}


def test_switched_off_and_on_a_stage_gives_the_states_back(two, tmp_path):
    run = tmp_path / "run"
    ends = {name: logits(f"{run}@{name}") for name in ("facts", "style")}
    assert torch.equal(logits(run), ends["style"])
    mix_stages(run, {"style": 0})
    assert torch.equal(logits(run), ends["facts"])
    mix_stages(run, {"style": 0.5})
    # one rounding of every weight, in float32
    half = logits(open_run(run, {"facts": 1, "style": 0.5}))
    torch.testing.assert_close(logits(run), half, rtol=0, atol=0)
    assert torch.equal(logits(open_run(run, ["facts"])), ends["facts"])
    mix_stages(run, {"style": 1})
    assert torch.equal(logits(run), ends["style"])
    assert torch.equal(logits(f"{run}@style"), ends["style"])


def test_a_base_beside_the_run_is_found_from_another_folder(config, tmp_path, monkeypatch):
    """To add a stage, in place or as a fork, and to finish one; `load_run` found it already."""
    shutil.copytree(config["model"], tmp_path / "base")
    config |= {"model": "base", "output": "run"}
    monkeypatch.chdir(tmp_path)
    first, law = one_stage(config), stage_of(config, "style")

    def stop(event):
        if event.name == "step" and event.step > 3:
            raise Stop

    with pytest.raises(Stop):
        train_stages(make_stages(first), listener=stop)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_stages(make_stages(first | {"output": "../run"}), matrix=False)
    train_stages(extension("../run", law | {"name": "fork", "output": "fork"}), matrix=False)
    train_stages(extension("../run", law), matrix=False)
    monkeypatch.chdir(tmp_path)
    assert [where.state for where in survey(make_stages(config))] == ["finished"] * 2
    assert open_run("elsewhere/fork").stages == ["facts", "fork"]


def test_a_stage_begins_on_what_the_mix_made(two, tmp_path):
    run = tmp_path / "run"
    mix_stages(run, {"facts": 0.5})
    train_stages(extension(run, stage_of(two, "style") | {"name": "law"}))
    strengths = [link.strength for link in open_run(run).links()]
    assert strengths == [0.5] * 3 + [1.0] * 4
    found = open_run(f"{run}@law")
    assert [facts.stage for facts in found.facts] == ["facts"] * 3 + ["style"] * 2 + ["law"] * 2
    assert found.first == 5


def test_in_place_a_stage_begins_on_the_state_that_is_named(two, tmp_path):
    """On a stage as it was trained, though the run is a mix, which it stays."""
    run, law = tmp_path / "run", stage_of(two, "style") | {"name": "law"}
    mixed = mix_stages(run, {"style": 0.5})
    (stage,) = extension(f"{run}@style", law)
    assert stage.after == "style"
    assert extension(f"{run}@style", law | {"output": str(tmp_path / "fork")})
    train_stages([stage], matrix=False)
    assert open_run(run).state == mixed.state
    assert open_run(f"{run}@law").strengths == {"facts": 1, "style": 1, "law": 1}
    for address in (f"{run}@style", run):
        assert train_stages(extension(address, law), matrix=False) == [None]
    with pytest.raises(RunError, match="stage 'law' must go on from where it was begun"):
        extension(f"{run}@facts", law)


def test_a_mix_that_cannot_be_scored_is_made_all_the_same(config, tmp_path, capsys):
    config["model"] = str(shutil.copytree(config["model"], tmp_path / "base"))
    train_stages(make_stages(config), matrix=False)
    shutil.rmtree(tmp_path / "base")
    assert cli(["mix", str(tmp_path / "run"), "style=0.5"]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == ["facts=1", "style=0.5"]
    said = f"{tmp_path / 'run'} is this mix now; next, what it scores\n"  # should it be killed then
    assert "the mix was not scored: `model` must be" in shown.err.partition(said)[2]


def test_stages_of_what_reads_a_run_can_be_chosen_too(two, tmp_path):
    mixed = open_run(tmp_path / "run", {"facts": 0.5, "style": 1})
    strengths = [link.strength for link in open_run(mixed, "style").links()]
    assert strengths == [0.0] * 3 + [1.0] * 2
    assert open_run(mixed) is mixed


def test_a_fork_of_a_mix_says_the_strengths_that_it_has(config, tmp_path, capsys):
    run, fork = tmp_path / "run", tmp_path / "fork"
    config["chain"]["hold"], config["train"]["seed"] = "carried", 3
    train_stages(make_stages(config), matrix=False)
    chain = load_chain(f"{run}@facts", AutoModelForCausalLM.from_pretrained(config["model"]))
    assert (len(chain), chain.hold, chain.seed) == (3, "carried", 3)
    mix_stages(run, {"facts": 0.5, "style": 0})
    own = stage_of(config, "style") | {"name": "law", "output": str(fork)}
    train_stages(extension(run, own), matrix=False)
    for address in (fork, run):
        assert cli(["mix", str(address), "--no-scores"]) == 0
    assert capsys.readouterr().out.split() == [
        *("facts=0.5", "style=0", "law=1"),
        *("facts=0.5", "style=0"),
    ]
    (*ends, _), (*same, law) = stage_matrix(run).grid, stage_matrix(fork).grid
    assert [row[:2] for row in same] == ends  # what a stage ended in stays that in a fork of a mix
    mix_stages(fork, {"facts": 1})
    assert stage_matrix(fork).grid[:-1] == [*same, law]


def test_a_stage_ends_inside_itself_with_its_best_point(config, tmp_path):
    """The first stage keeps its best point: the second begins there, and not at the last link."""
    config["stages"][0] |= {
        "chain": {"ranks": [4, 4], "steps": [1, 9]},
        "train": {"keep_best": True, "eval_every": 1, "schedule": "constant"},
    }
    train_stages(make_stages(config))
    first = open_run(f"{tmp_path / 'run'}@facts")
    selected = inspect_run(first)["selected"]
    assert selected["partial"]
    assert selected["step"] < 10  # every row is right long before the last step
    records = [record for record in first.records() if record["step"] == selected["step"]]
    (loss,) = (record["loss"] for record in records if record["event"] == "step")
    (scores,) = (record for record in records if record["event"] == "eval")
    link = inspect_run(tmp_path / "run")["links"][1]
    assert (link["loss"], link["scores"]["loss"]) == (loss, scores["loss"])
    export_adapter(f"{tmp_path / 'run'}@facts", tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert f"| 1 | 4 | 2 | {selected['step'] - 1} | 1.0000 | {scores['loss']:.4f} |" in card
    export_adapter(tmp_path / "run", tmp_path / "whole")
    card = (tmp_path / "whole/README.md").read_text(encoding="utf-8")
    table = card.partition("## Lineage")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["| link", "| ---", "| 0", "| 1", "| before", "| 2", "| 3"]  # the last stage
    assert "Links from 2 on were trained on the task `task`" in card
    begun_on = open_run(tmp_path / "run").parent
    assert begun_on == first.state
    assert len(links_of(f"{tmp_path / 'run'}@facts")) == 2  # the links after it are kept too


def test_a_stage_stopped_anywhere_resumes_to_the_same_bits(config, tmp_path):
    whole = config | {"output": str(tmp_path / "whole")}
    train_stages(make_stages(whole))
    config["train"]["save_every"] = 1
    for stop in range(1, 11):
        with pytest.raises(Stop):
            train_stages(make_stages(config), listener=_stop_after(stop))
    train_stages(make_stages(config))
    for name in ("facts", "style"):
        stopped, unbroken = (open_run(f"{tmp_path / run}@{name}") for run in ("run", "whole"))
        assert stopped.state == unbroken.state
        assert_same_links(f"{tmp_path / 'run'}@{name}", f"{tmp_path / 'whole'}@{name}")


def test_stages_that_are_half_trained_leave_the_run_alone(config, tmp_path, caplog):
    """Another one begins without it, and the one that ends later ends beside the run, in words."""
    run, style = tmp_path / "run", stage_of(config, "style")
    with pytest.raises(Stop):
        train_stages(make_stages(one_stage(config)), listener=_stop_after(3))
    with pytest.raises(RunError, match="Cannot mix: the first stage has not ended"):
        mix_stages(run, {"facts": 0.5})
    with pytest.raises(RunError, match="starts from a finished run"):
        load_start(run)
    with pytest.raises(RunError, match="whose first stage has ended"):
        extension(run, style)
    train_stages(make_stages(one_stage(config)))
    facts = logits(run)
    with pytest.raises(Stop):
        train_stages(extension(run, style), listener=_stop_after(8))
    for act in (lambda: prune_stage(run, "facts"), lambda: open_run(f"{run}@style")):
        with pytest.raises(RunError, match=r"style is half trained|'style', which has not ended,"):
            act()
    assert torch.equal(logits(run), facts)
    (run / "stages/.ipynb_checkpoints").mkdir()  # what looks at folders leaves is no stage
    both = config | {"stages": [*config["stages"], style | {"name": "law"}]}
    assert [each.state for each in survey(make_stages(both))] == ["finished", "stopped", "new"]
    train_stages(extension(run, style | {"name": "law"}), matrix=False)
    assert "stage style is half trained, and law begins without it" in caplog.text
    law = logits(run)
    train_stages(extension(run, style), matrix=False)
    assert f"chainlora undo {run} --to style" in caplog.text
    assert torch.equal(logits(run), law)
    assert open_run(f"{run}@style").stages == ["facts", "style"]


def test_a_mix_while_a_stage_is_trained_does_not_reach_it(config, tmp_path, caplog):
    train_stages(make_stages(one_stage(config)))
    style, run = stage_of(config, "style"), tmp_path / "run"
    with pytest.raises(Stop):
        train_stages(extension(run, style), listener=_stop_after(7))
    mix_stages(run, {"facts": 0.5})
    train_stages(extension(run, style), matrix=False)
    assert "which is without stage style" in caplog.text
    assert open_run(run).strengths == {"facts": 0.5}
    assert open_run(f"{run}@style").strengths == {"facts": 1.0, "style": 1.0}
    undo(run, to="style")
    assert open_run(run).strengths == {"facts": 1.0, "style": 1.0}


def _stop_at(cell: str):
    def progress(what: str, done: int, rows: int) -> None:
        if what == cell:
            raise Stop

    return progress


def _stop_after(total: int):
    """Stop where `total` steps of both stages are done: step 3 of 6, or step 2 of the second."""

    def listener(event) -> None:
        done = event.step + (6 if stage[0] == "style" else 0)
        stage[0] = getattr(event, "stage", stage[0])
        if event.name == "step" and done == total:
            raise Stop

    stage = [""]
    return listener


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "facts"}, "every stage must have a name of its own"),
        ({"name": "9"}, "must have a `name`"),
        ({"name": "x²"}, "must have a `name`"),
        ({"name": None}, "must have a `name`"),
        ({"name": "base"}, "not base, start or now"),
        ({"name": "now"}, "not base, start or now"),
        ({"model": "m"}, "nothing of the whole run .*`model`"),
        ({"data": {"chat_template": "chatml"}}, "`data.chat_template` must be the same"),
        ({"data": {"template_arguments": {}}}, "`data.template_arguments` must be the same"),
        ({"chain": {"hold": "carried"}}, "`chain.hold` must be the same"),
        ({"train": {"dtype": "bfloat16"}}, "`train.dtype` must be the same"),
        ({"train": {"seed": 3}}, "`train.seed` must be the same"),
        ({"train": {"shard": "fsdp2"}}, "`train.shard` must be the same"),
        ({"train": {"lrr": 3}}, "stage 'style': unknown key `train.lrr`"),
        ({"chain": []}, "stage 'style'"),
        (
            {"chain": {"tune": "full", "ranks": [2], "steps": [1]}},
            "stage 'style': stages are links",
        ),
    ],
)
def test_what_a_stage_cannot_say_is_refused_in_a_line(config, change, message):
    config["stages"][1] |= change
    if change.get("chain") == []:
        config["stages"][1]["chain"] = {"ranks": [2]}
        message = "must say how long"
    with pytest.raises(ConfigError, match=message) as raised:
        make_stages(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stages", [[], {}, "facts", None, [3]])
def test_stages_are_a_list(config, stages):
    with pytest.raises(ConfigError, match="stage"):
        make_stages(config | {"stages": stages})


@pytest.mark.parametrize("key", ["data", "chain", "train", "start"])
def test_a_key_of_all_stages_of_another_kind_is_refused(config, key):
    with pytest.raises(ConfigError, match=f"`{key}` must be a"):
        train(config | {key: 5})


def test_run_wide_keys_of_an_extension_and_stages_that_are_not_there_are_refused(two, tmp_path):
    run, style = tmp_path / "run", stage_of(two, "style")
    cases = [
        (run, {"model": "m"}, "nothing of the whole run"),
        (run, {"train": {"seed": 1}}, "`train.seed`"),
        (run, {"name": "facts"}, "the first"),
        (run, {"chain": {"ranks": [4]}, "name": "style"}, "stage 'style'"),
        (
            run,
            {"chain": {"ranks": [4], "steps": [1]}},
            r"it began with \(got stage 'style': chain.ranks",
        ),
        (f"{run}@nope", {"name": "law", "output": str(tmp_path / "x")}, "one of facts, style"),
    ]
    before = files_of(run)
    for address, change, message in cases:
        with pytest.raises(ChainLoRAError, match=message):
            train_stages(extension(address, style | change))
    for strengths, message in [({"nope": 1}, "one of facts"), ({"style": 1e9}, "within")]:
        with pytest.raises(ChainLoRAError, match=message):
            mix_stages(run, strengths)
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("below", "chain", "strengths", "words"),
    [
        ({"dora": True}, {"dora": False}, {"style": 0}, "DoRA or extra modules can be 0 only"),
        ({}, {"dora": True}, {"facts": 0.5}, "below a DoRA link must be 1"),
    ],
)
def test_a_stage_that_the_mix_does_not_bear_is_refused_before_any_is_trained(
    config, tmp_path, below, chain, strengths, words
):
    """In the run, in a fork, and where another new stage comes first."""
    run, style = tmp_path / "run", stage_of(config, "style")
    keys = {"ranks": [2], "steps": [1]}
    config["stages"][1] = style | {"chain": keys | below}
    train_stages(make_stages(config), matrix=False)
    mix_stages(run, strengths)
    law = style | {"name": "law", "chain": keys | chain}
    tree = config | {"start": str(run), "output": str(tmp_path / "fork")}
    plain = law | {"name": "plain", "chain": keys | {"dora": bool(below)}}
    before = files_of(run)
    for stages in (
        extension(run, law),
        extension(run, law | {"output": str(tmp_path / "fork")}),
        make_stages(tree | {"stages": [plain | {"chain": keys}, law]}),
    ):
        with pytest.raises(
            RunError, match=f"stage '(law|plain)' cannot be trained on .*{words}.*by `mix`"
        ):
            survey(stages)
    assert files_of(run) == before


def test_a_config_that_begins_on_a_stage_is_the_fork(config, tmp_path, capsys):
    train_stages(make_stages(one_stage(config)))
    address = f"{tmp_path / 'run'}@facts"
    style = stage_of(config, "style") | {"name": "main", "train": config["train"]}
    train_stages(extension(address, style | {"output": str(tmp_path / "fork")}))
    own = {key: style[key] for key in ("data", "train")} | {"start": address}
    own |= {"chain": config["chain"] | style["chain"], "output": str(tmp_path / "new")}
    (tmp_path / "new.yaml").write_text(json.dumps(own | {"start": None}))
    words = ["train", str(tmp_path / "new.yaml"), "--start", address]
    for _ in range(2):
        assert cli(words) == 0
    assert_same_links(tmp_path / "fork", tmp_path / "new")
    before = json.loads((tmp_path / "new.yaml").read_text())
    for name, status in (({"name": config["model"]}, 0), ({"name": "m"}, 1), ({"nme": "m"}, 1)):
        changed = before | {"model": name, "output": str(tmp_path / "fresh")}
        (tmp_path / "model.yaml").write_text(json.dumps(changed))
        capsys.readouterr()
        again = ["train", str(tmp_path / "model.yaml"), *words[2:], "--dry-run"]
        assert cli(again) == status
        message = "name and quantize" if "nme" in name else "`model` must equal the value"
        assert not status or message in capsys.readouterr().err
    other = own | {"model": config["model"], "output": str(tmp_path / "other")}
    train(other)
    assert_same_links(tmp_path / "fork", tmp_path / "other")
    for output in ("new", "fresh"):  # that of the run, or of the one that is begun on
        assert cli([*words, "--train.seed", "1", "--output", str(tmp_path / output)]) == 1
    assert open_run(tmp_path / "new").stages == ["facts", "main"]
    alone = train_run(make_config(other | {"output": None}))
    assert alone["metrics"] == open_run(tmp_path / "new").result()["metrics"]


def test_a_run_that_has_begun_does_not_need_what_it_began_on(config, tmp_path, capsys):
    config["chain"]["hold"] = "carried"  # which the config leaves to the run that is begun on
    train_stages(make_stages(one_stage(config)))
    style = stage_of(config, "style")
    own = {"start": f"{tmp_path / 'run'}@facts", "output": str(tmp_path / "new")}
    own |= {key: style[key] for key in ("data", "chain")} | {"train": config["train"]}
    own["data"] |= {"replay": 0.25}
    with pytest.raises(Stop):
        train(own, listener=_stop_after(1))
    whole, fork = own | {"output": str(tmp_path / "whole")}, tmp_path / "fork"
    train(whole)
    with pytest.raises(Stop):
        train_stages(
            extension(own["start"], style | {"output": str(fork)}), listener=_stop_after(7)
        )
    export_adapter(own["start"], tmp_path / "adapter")
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    data = style["data"] | {"chat_template": str(tmp_path / "mine.jinja")}  # kept as its text
    on_adapter = own | {"start": str(tmp_path / "adapter"), "output": str(tmp_path / "second")}
    on_adapter["data"] = {key: data[key] for key in data if key != "replay"}
    train(on_adapter | {"model": config["model"]})
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "adapter")
    train(on_adapter)
    for _ in range(2):
        train(own)
    assert cli(["train", str(tmp_path / "new/stages/main/config.yaml")]) == 0
    assert_same_links(tmp_path / "new", tmp_path / "whole")
    assert cli(["train", str(fork / "stages/style/config.yaml")]) == 0  # what `extend` began
    assert open_run(fork).stages == ["facts", "style"]
    with pytest.raises(ConfigError, match=r"`start` must be what the run began on .*run@other"):
        train(own | {"start": f"{tmp_path / 'run'}@other"})
    with pytest.raises(
        ChainLoRAError, match=r"a run or adapter must be there .*run@facts: no .*run/history.json"
    ):
        train(own | {"output": str(tmp_path / "third")})


# Whole commands by their words; ADDRESS is the run, or a stage of it.
VERBS = {
    "eval": "eval ADDRESS --limit 2",
    "generate": "generate ADDRESS --prompt good --max-new-tokens 2",
    "chat": "chat ADDRESS",
    "inspect": "inspect ADDRESS",
    "report": "report ADDRESS",
    "adapter": "export ADDRESS --to adapter --output OUT",
    "merged": "export ADDRESS --to merged --output OUT",
}
CHOICES = {
    "": 0,
    "--links 1": 0,
    "--stages facts=0.5": 0,
    "--stages nope": 1,
    "--stages facts --links 1": 2,
}


@pytest.mark.slow
def test_every_verb_takes_every_state_or_refuses_it_in_a_line(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    run = str(tmp_path / "run")
    for number, (verb, stage, choice) in enumerate(
        product(VERBS, ("", "@facts", "@nope"), CHOICES)
    ):
        if choice and verb != "eval" and (verb in ("inspect", "report") or stage):
            continue
        words = f"{VERBS[verb]} {choice}".replace("ADDRESS", run + stage)
        capsys.readouterr()
        status = cli(words.replace("OUT", str(tmp_path / f"out-{number}")).split())
        assert status == (CHOICES[choice] or int(stage == "@nope")), words
        said = capsys.readouterr().err
        assert status != 1 or "a stage must be one of facts" in said.splitlines()[-1]


def test_the_command_line_goes_from_two_data_sets_to_one_adapter(config, tmp_path, capsys):
    stages, run = config.pop("stages"), tmp_path / "run"
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(config | {"stages": stages[:1]}))
    (tmp_path / "style.yaml").write_text(json.dumps(stages[1]))
    assert cli(["train", str(file), "--dry-run"]) == 0
    assert "facts: would train links of rank 4, 4, 2" in capsys.readouterr().out
    rows = [str(stages[0]["data"]["train"]), str(tmp_path / "more.jsonl")]
    several = json.dumps([rows[0], {"path": rows[1], "weight": 2}])
    assert cli(["train", str(file), "--dry-run", "--stages.facts.data.train", several]) == 0
    assert capsys.readouterr().out.endswith(f" rank 4, 4, 2 on {', '.join(rows)}\n")
    assert not run.exists()
    assert cli(["train", str(file)]) == 0
    assert cli(["extend", str(run), str(tmp_path / "style.yaml"), "--on-top"]) == 0
    capsys.readouterr()
    for command in (
        ["extend", str(run), str(tmp_path / "style.yaml"), "--on-top"],
        ["train", str(file)],
    ):
        assert cli(command) == 0
        assert "nothing left to do" in capsys.readouterr().out
    assert cli(["mix", str(run), "style=0"]) == 0
    assert cli(["mix", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["strengths"]["style"] == 0
    assert cli(["export", str(run), "--to", "adapter", "--output", str(tmp_path / "a")]) == 0
    assert "from 3 link(s)" in capsys.readouterr().out
    only = ["--to", "adapter", "--stages", "facts"]
    assert cli(["export", str(run), *only, "--output", str(tmp_path / "b")]) == 0
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")  # the card too
    assert "Trained on" not in (tmp_path / "a/README.md").read_text()  # a stage that is off
    for name, stages, is_scored in (("c", "facts,style=0.5", False), ("d", "facts,style", True)):
        only = ["--to", "adapter", "--stages", stages, "--output", str(tmp_path / name)]
        assert cli(["export", str(run), *only]) == 0
        card = (tmp_path / name / "README.md").read_text()
        assert ("validation `accuracy`" in card) == is_scored  # scored was another mix
    assert cli(["mix", str(run), "style=1", "style=0"]) == 1
    assert "a stage must have one strength (got 'style' twice)" in capsys.readouterr().err
    assert cli(["eval", str(run), "--matrix", "--stages", "facts"]) == 2
    assert "--matrix scores the kept rows in all states; leave --stages out" in (
        capsys.readouterr().err
    )
    for address in (f"{run}@facts", f"{run}@style", str(run)):
        capsys.readouterr()
        assert cli(["inspect", address]) == 0
        planned = ["3 × 2 steps", *(["2 steps, 3 steps"] if "@facts" not in address else [])]
        lines = [line for line in capsys.readouterr().out.splitlines() if "planned" in line]
        assert [line.partition(": ")[2] for line in lines] == planned
        assert cli(["eval", address]) == 0
    assert cli(["train", str(file), "--stages.facts.train.lr", "1"]) == 1
    assert cli(["eval", f"{run}@nope"]) == 1


def test_a_stage_that_cannot_be_trained_is_refused_before_the_stages_before_it(config, tmp_path):
    config["stages"][1]["data"] |= {"train": str(tmp_path / "none.jsonl")}
    with pytest.raises(ChainLoRAError, match=r"stage 'style': .*none.jsonl"):
        train_stages(make_stages(config))
    assert not (tmp_path / "run").exists()
    style, data = config["stages"][1], config["stages"][0]["data"]
    for change, message in (
        ({"chain": style["chain"] | {"target_modules": ["q_pro"]}}, "got .'q_pro'.*; candidates"),
        ({"data": data | {"max_length": 10_000}}, "must fit the model's context"),
        ({"chain": style["chain"] | {"extra_modules": ["q_proj"]}}, "chain adapt a module, or"),
        ({"train": {"optimizer": "adamm"}}, "`train.optimizer` must be one of"),
        ({"chain": style["chain"] | {"knots": {"policy": "space", "every": 1}}}, "policy` must be"),
    ):
        tree = config | {"stages": [config["stages"][0], style | {"data": data} | change]}
        with pytest.raises(ChainLoRAError, match=f"stage 'style': .*{message}"):
            train_stages(make_stages(tree))
    assert not (tmp_path / "run").exists()
    (tmp_path / "none.jsonl").write_text('{"text": "no pair"}\n')
    config["stages"][1]["data"] = {"train": str(tmp_path / "none.jsonl")}
    config["stages"][1]["train"] = {"loss": "dpo", "lr": 1e-3}
    with pytest.raises(ChainLoRAError, match=r"stage 'style': .*chosen"):
        train_stages(make_stages(config))
    assert not (tmp_path / "run").exists()


def test_the_matrix_is_what_eval_says_and_is_kept(config, tmp_path):
    """Average, transfer and forgetting have tests of their own (test_metrics.py)."""
    run = tmp_path / "run"
    train_stages(make_stages(config))
    (run / "matrix.jsonl").unlink()
    (tmp_path / "run@style").mkdir()  # an export named after the state: no state of the run
    with pytest.raises(Stop):  # what was scored until then is kept
        stage_matrix(run, progress=_stop_at("style: facts"))
    assert len((run / "matrix.jsonl").read_text().splitlines()) == 4
    found = stage_matrix(run)
    assert found.states == ["base", "facts", "style"]
    for state, row in zip(found.states, found.grid, strict=True):
        links = {"base": 0, "facts": 3, "style": 5}[state]
        score = evaluate_task(run, num_links=links)["metrics"]["accuracy"]
        assert [cell.value for cell in row] == [score, score]  # both stages have these rows
    (summary,) = found.summaries()
    assert (summary.metric, summary.stages) == ("accuracy", ("facts", "style"))
    before = (run / "matrix.jsonl").read_bytes()
    mix_stages(run, {"facts": 0.25})
    assert stage_matrix(run, compute=False).grid[-1] == [None, None]
    assert stage_matrix(run).states == ["base", "facts", "style", "now"]
    assert (run / "matrix.jsonl").read_bytes().startswith(before)
    assert str(stage_matrix(run)).splitlines()[-1] == f"after style, {summary}"
    assert stage_matrix(run).summaries() == [summary]  # the mix does not pass for the last stage
    again = stage_matrix(run).grid
    (run / "matrix.jsonl").unlink()
    assert stage_matrix(run).grid == again  # to the bit
    for data in ("train", "validation"):  # the rows are the run's own
        Path(config["stages"][0]["data"][data]).unlink()
    (run / "matrix.jsonl").unlink()
    assert stage_matrix(run).grid == again
    (run / "matrix.jsonl").unlink()
    assert stage_matrix(f"{run}@facts").states == ["base", "facts"]  # as that stage ended
    assert stage_matrix(f"{run}@facts").grid == [row[:1] for row in again[:2]]
    best, after, now = best_mix(run)
    assert after >= now
    assert set(best) == {"facts", "style"}


def test_a_rank_that_no_launcher_has_set_is_none(config, tmp_path, capsys, monkeypatch):
    """Some shells have a RANK; only beside WORLD_SIZE it says that another process shows things."""
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ["facts", "style"]
    assert open_run(tmp_path / "run").stages == ["facts", "style"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"no JSON", b"[" * 50000, b"\xff\xfe", b'{"state": 1}', b"null", '"value": "high"'],
)
def test_a_damaged_line_of_a_matrix_is_scored_again(two, tmp_path, capsys, damage):
    run, path = tmp_path / "run", tmp_path / "run/matrix.jsonl"
    grid, whole = stage_matrix(run, compute=False).grid, path.read_bytes()
    lines = whole.splitlines()
    if isinstance(damage, str):
        damage = re.sub(rb'"value": [^,]+', damage.encode(), lines[2])
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    assert sum(cell is None for row in stage_matrix(run, compute=False).grid for cell in row) == 1
    assert cli(["extend", str(run), "--on-top", "--name", "style", *_same_as(two, "style")]) == 0
    assert stage_matrix(run, compute=False).grid == grid
    assert sorted(path.read_bytes().splitlines()) == sorted(lines)


def _same_as(config: dict, name: str) -> list[str]:
    """Return the options that give `extend` a stage of a config."""
    stage = stage_of(config, name)
    keys = {
        f"--{part}.{key}": value for part in ("data", "chain") for key, value in stage[part].items()
    }
    return [word for key, value in keys.items() for word in (key, json.dumps(value))]


def test_a_run_without_links_has_nothing_to_compare(config, tmp_path):
    config["stages"][0]["chain"] = {"ranks": [], "steps": []}
    train(make_stages(one_stage(config))[0].config)
    with pytest.raises(RunError, match=r"got no links in .*; tie a link first"):
        stage_matrix(tmp_path / "run")
    with pytest.raises(RunError, match="got no rows of links in"):
        best_mix(tmp_path / "run")


def test_a_best_point_scores_as_itself(config, tmp_path):
    """It is a part of a link that was whole when the run was stopped: another state."""
    facts = {"ranks": [4, 4], "steps": [9, 2]}
    keys = {"keep_best": True, "eval_every": 1, "schedule": "constant", "save_every": 1}
    config["stages"][0] |= {"chain": facts, "train": keys}
    (stage,) = make_stages(one_stage(config))
    stop_after(stage.config, 9)
    whole = stage_matrix(tmp_path / "run").grid[-1][0]
    train(stage.config, resume=True)
    selected = inspect_run(tmp_path / "run")["selected"]
    assert selected["num_links"] == 0
    assert selected["step"] < 9
    assert stage_matrix(tmp_path / "run").grid[-1][0].state != whole.state


def test_the_best_mix_of_what_is_no_sum_is_refused(config, tmp_path):
    config["stages"][1]["chain"]["dora"] = True
    train_stages(make_stages(config))
    with pytest.raises(RunError, match=r"links that are low-rank sums .*DoRA.* name the strengths"):
        best_mix(tmp_path / "run")


def test_the_best_mix_weakens_a_stage_that_harms_the_rows_of_others(config, tmp_path):
    """Wrong answers, of which no rows are kept, undo what the first stage has learned."""
    facts, style = config["stages"]
    facts["chain"] = {"ranks": [4], "steps": [12]}
    wrong = tmp_path / "wrong.jsonl"
    rows = map(json.loads, Path(facts["data"]["train"]).read_text().splitlines())
    wrong.write_text("".join(json.dumps(r | {"label": 1 - r["label"]}) + "\n" for r in rows))
    style["data"] = {"task": facts["data"]["task"], "train": str(wrong), "keep_rows": False}
    style["chain"] = {"ranks": [4], "steps": [12]}
    train_stages(make_stages(config), matrix=False)
    best, after, now = best_mix(tmp_path / "run")
    assert best["style"] < 0.5 < best["facts"]
    assert after > now + 0.2  # accuracy on 16 rows
    assert open_run(tmp_path / "run").strengths == {"facts": 1, "style": 1}  # only said


def test_rows_that_are_not_kept_are_missing_from_the_matrix(config, tmp_path):
    config["stages"][0]["data"]["keep_rows"] = False
    train_stages(make_stages(one_stage(config)))
    assert cli(["mix", str(tmp_path / "run"), "facts=0"]) == 0  # there is nothing to score it by
    mix_stages(tmp_path / "run", {"facts": 1})
    train_stages(make_stages(config))
    found = stage_matrix(tmp_path / "run")
    assert [[cell is None for cell in row] for row in found.grid] == [[True, False]] * 3
    assert found.summaries() == []


# --- extend ---


def test_an_extension_inherits_how_earlier_rows_are_read_and_says_what_it_does_not(
    two, tmp_path, caplog
):
    run, style = tmp_path / "run", stage_of(two, "style")
    both = style | {"name": "both", "train": {"keep_best": True, "eval_every": 1}}
    rows = [{"text": f"good good {word}", "label": 1} for word in ("cat", "mat", "hill", "two")]
    more = str(write_rows(tmp_path / "new.jsonl", rows))
    both["data"] = style["data"] | {"train": more, "replay": 0.25, "new_rows_only": True}
    both["chain"] = style["chain"] | {"alpha": [8, 4]}
    train_stages(extension(run, both), matrix=False)
    assert "stage both does not inherit" not in caplog.text  # it gives all that style had set
    own = {"name": "law", "chain": {"ranks": [2], "epochs": [1]}, "data": {"train": "x.jsonl"}}
    data = extension(run, own)[-1].config.data
    assert (data.replay, data.new_rows_only) == (0.25, True)
    said = (
        "stage law does not inherit data.task, data.validation, chain.alpha, train.keep_best from"
    )
    assert caplog.messages[-1] == f"{said} both"
    off = own | {"data": own["data"] | {"replay": None}}
    assert extension(run, off)[-1].config.data.replay is None


def test_a_fork_inside_a_run_is_refused(two, tmp_path, capsys):
    """Its parent took it for a stage of its own."""
    run, before = tmp_path / "run", files_of(tmp_path / "run")
    keys = ["--name", "z", "--chain.ranks", "2", "--chain.steps", "1", "--data.train", "x"]
    assert cli(["extend", f"{run}@facts", *keys, "--output", str(run / "stages/z")]) == 1
    assert f"must lie outside other runs (got {run / 'stages/z'}, " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="must lie outside other runs"):
        train(two | {"output": str(run / "sub/run")})
    assert files_of(run) == before


# --- accept_links: a number ---


@pytest.fixture
def harmful(config, tmp_path) -> dict:
    """Return the config with a second stage that learns the opposite of the first."""
    flipped = []
    for line in (tmp_path / "rows/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        flipped.append(json.dumps(row | {"label": 1 - row["label"]}))
    (tmp_path / "more.jsonl").write_text("\n".join(flipped) + "\n")
    facts, style = config["stages"]
    facts["chain"] |= {"ranks": [4], "steps": [30]}
    style["chain"] |= {"ranks": [4], "steps": [30]}
    facts["train"] = {"lr": 1e-2}
    style["train"] = {"lr": 1e-2, "accept_links": 0.0}
    return config


def test_a_stage_that_harms_earlier_ones_is_weakened_until_they_lose_no_more(
    harmful, tmp_path, capsys
):
    """The command line says what it did; typed again, it does nothing."""
    run, file = tmp_path / "run", tmp_path / "mine.yaml"
    file.write_text(json.dumps(harmful))
    status = cli(["train", str(file)])
    said, found = capsys.readouterr().err, open_run(run).strengths
    assert found["style"] < 1
    assert f"stage style: strength {found['style']:g} by accept_links" in said
    assert status == (0 if found["style"] else 3)
    assert cli(["train", str(file)]) == 0
    before, full, now = stage_matrix(run).grid[1:]
    if found["style"]:
        assert before[0].value - now[0].value <= before[0].error + now[0].error
    else:
        assert now[0] == before[0]
    assert full[0].value < before[0].value - full[0].error  # there was something to lose
    mix_stages(run, {"style": 1.0})  # what was weakened is not lost
    assert torch.equal(logits(f"{run}@style"), logits(run))


def test_a_stage_within_the_tolerance_keeps_its_strength(harmful, tmp_path):
    harmful["stages"][1]["train"]["accept_links"] = 1.0
    train_stages(make_stages(harmful))
    assert open_run(tmp_path / "run").strengths == {"facts": 1, "style": 1}


def test_a_stage_that_no_strength_makes_harmless_is_off_and_the_exit_status_says_so(
    harmful, tmp_path, capsys
):
    """At a quarter of its strength 60 steps at this rate still overrule the first stage."""
    harmful["stages"][1]["train"]["lr"] = 0.1
    harmful["stages"][1]["chain"]["steps"] = [60]
    (tmp_path / "mine.yaml").write_text(json.dumps(harmful))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 3
    told = capsys.readouterr()
    assert "switched off by accept_links: style" in told.err
    assert json.loads(told.out)["strengths"] == {"facts": 1.0, "style": 0.0}
    assert torch.equal(logits(tmp_path / "run"), logits(f"{tmp_path / 'run'}@facts"))


@pytest.mark.parametrize("is_fork", [False, True])
def test_a_signal_between_training_and_judging_loses_neither(harmful, tmp_path, is_fork, capsys):
    train_stages(make_stages(one_stage(harmful)))
    section = stage_of(harmful, "style") | ({"output": str(tmp_path / "fork")} if is_fork else {})
    run = tmp_path / ("fork" if is_fork else "run")

    def listener(event) -> None:
        if event.name == "scored":
            os.kill(os.getpid(), signal.SIGINT)

    with interruptible() as interrupts:
        interrupts.defer()
        with pytest.raises(
            StoppedError, match=r"SIGINT.*before: facts\); the same command goes on"
        ):
            train_stages(extension(tmp_path / "run", section), listener=listener)
    not_judged = (
        r"^Cannot use .*: stage 'style' is trained but not yet judged by accept_links\. Run"
    )
    assert open_run(f"{tmp_path / 'run'}").stages == ["facts"]
    capsys.readouterr()
    if is_fork:  # it would pass for judged
        for words in _verbs_on(run, tmp_path):
            assert cli(words) == 1, words
            assert re.search(not_judged, capsys.readouterr().err.removeprefix("chainlora: error: "))
        for verb in ("inspect", "report"):
            assert cli([verb, str(run)]) == 0
        assert "not judged: stage style" in capsys.readouterr().out
        assert "is not judged yet" in (run / "report.html").read_text()
        for start in (run, f"{run}@style"):
            with pytest.raises(RunError, match=rf"{not_judged}|has not ended"):
                survey(extension(start, section | {"name": "law", "output": str(tmp_path / "x")}))
        with pytest.raises(RunError, match=not_judged):
            prune_stage(run, "facts")
    train_stages(extension(tmp_path / "run", section))
    assert open_run(run).strengths["style"] < 1
    assert train_stages(extension(tmp_path / "run", section)) == [None]


def _verbs_on(run: Path, tmp_path: Path) -> list[list[str]]:
    """Return each command that uses a run."""
    to = ["--output", str(tmp_path / "out")]
    verbs = {"generate": ["--prompt", "a"], "eval": [], "export": ["--to", "adapter", *to]}
    found = [[verb, str(run), *words] for verb, words in verbs.items()]
    alone = [["chat", str(run)], ["eval", str(run), "--matrix"]]
    return [*found, *alone, ["mix", str(run), "style=1"]]


def test_what_needs_earlier_stages_is_refused_without(config, tmp_path, capsys):
    plain = {key: value for key, value in config.items() if key != "stages"}
    plain["data"] = config["stages"][0]["data"]
    plain["chain"] |= config["stages"][0]["chain"]
    plain["train"] = {"accept_links": 0.02}
    (tmp_path / "plain.yaml").write_text(json.dumps(plain))
    assert cli(["train", str(tmp_path / "plain.yaml")]) == 1
    assert "0.02 in a run without any" in capsys.readouterr().err
    keys = ["--train.accept_links", "all", "--data.replay", "0.1"]
    assert cli(["train", str(tmp_path / "plain.yaml"), *keys]) == 1
    assert "0.1 in a run without any" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="without any"):
        train(plain)
    assert not (tmp_path / "run").exists()


def test_what_a_tolerance_needs_is_asked_for_before_any_training(harmful, tmp_path):
    harmful["stages"][0]["data"]["keep_rows"] = False
    with pytest.raises(RunError, match=r"accept_links.*none of facts.*keep_rows"):
        train_stages(make_stages(harmful))
    assert not (tmp_path / "run").exists()
    del harmful["stages"][1]["train"]["accept_links"]
    for key, value, off in (("replay", 0.1, "null"), ("new_rows_only", True, "false")):
        harmful["stages"][1]["data"][key] = value
        with pytest.raises(RunError, match=rf"data.{key}.*none of facts.*set data.{key}: {off}"):
            train_stages(make_stages(harmful))
    harmful["stages"][1]["train"]["accept_links"] = 0.0
    harmful["stages"][1]["chain"]["dora"] = True
    with pytest.raises(ConfigError, match="on or off"):
        make_stages(harmful)


def test_rows_that_no_stage_learns_alike_are_not_replayed(harmful, tmp_path):
    """Refused before any work: in the first stage, a later one, a fork, and beside a stage that
    has ended."""
    facts, style = harmful["stages"]
    del style["train"]["accept_links"]
    pairs = style | {"name": "pairs", "train": {"loss": "dpo", "lr": 1e-3}}
    pairs["data"] = pair_files(tmp_path) | {"replay": 0.1}
    again = facts | {"data": facts["data"] | {"replay": 0.1}}
    for stages, got in (
        ([again, style], "stage 'facts' .*no earlier stage"),
        ([facts, style, pairs], "learned by dpo .got facts: candidates, style: candidates"),
    ):
        with pytest.raises(RunError, match=got):
            train_stages(make_stages(harmful | {"stages": stages}))
        assert not (tmp_path / "run").exists()
    facts["chain"]["steps"] = [1]
    train_stages(make_stages(one_stage(harmful)))
    for output in ({}, {"output": str(tmp_path / "fork")}):
        with pytest.raises(RunError, match=r"learned by dpo .got facts: candidates"):
            survey(extension(tmp_path / "run", pairs | output))
    rows = tmp_path / "answers.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " was good"}\n')
    answers = style | {"data": {"train": str(rows), "replay": 0.1}}
    assert survey(extension(tmp_path / "run", answers))[-1].state == "new"


def test_what_a_chain_begins_on_is_asked_for_before_any_training(harmful, tmp_path):
    """A PEFT adapter has no rows, and its link a name; a stage that was pruned needs neither."""
    facts, style = harmful["stages"]
    facts["data"]["keep_rows"] = False
    del style["train"]["accept_links"]
    train_stages(make_stages(harmful))
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    begun = harmful | {"start": str(tmp_path / "adapter"), "output": str(tmp_path / "begun")}
    law = style | {"name": "law", "train": {"accept_links": 0.1}}
    for last, message in (
        (law, "none of start"),
        (style | {"name": "start"}, "not base, start or now"),
    ):
        with pytest.raises(ChainLoRAError, match=message):
            train_stages(make_stages(begun | {"stages": [style, last]}))
    assert not (tmp_path / "begun").exists()
    with pytest.raises(RunError, match="none of facts"):
        survey(extension(tmp_path / "run", law))
    prune_stage(tmp_path / "run", "facts")
    assert [found.state for found in survey(extension(tmp_path / "run", law))][-1] == "new"


def test_one_row_is_no_excuse(harmful, tmp_path):
    """It has no standard error."""
    for stage in harmful["stages"]:
        stage["data"] |= {"num_validation": 1}
    train_stages(make_stages(harmful))
    assert open_run(tmp_path / "run").strengths["style"] < 1


# --- prune ---


def test_a_pruned_stage_is_nowhere_and_later_ones_are_what_they_were_without(three, tmp_path):
    run = tmp_path / "run"
    without = {name: logits(open_run(run, name.split(","))) for name in ("facts,law", "law")}
    losses = [row["loss"] for row in inspect_run(run)["links"] if row["stage"] == "law"]
    for stage, left in (("style", "facts,law"), ("facts", "law")):
        own = open_run(f"{run}@{stage}")
        traces = {stage, str(own.entry.kept)[:16], *own.entry.tied, own.state.digest}
        traces |= {
            term.link
            for term, facts in zip(own.state.terms, own.facts, strict=True)
            if facts.stage == stage
        }
        prune_stage(run, stage)
        for path in (path for path in run.rglob("*") if path.is_file()):
            text = f"{path.relative_to(run)} {path.read_bytes().decode(errors='replace')}"
            is_config = path.name == "config.yaml"  # of a later stage: its own data
            assert is_config or not [trace for trace in traces if trace in text], path
        assert torch.equal(logits(run), without[left])
        assert torch.equal(logits(f"{run}@law"), without[left])
        found = inspect_run(run)["links"]
        assert [row["loss"] for row in found if row["stage"] == "law"] == losses
        with pytest.raises(RunError, match=r"a stage must be one of .*name one"):
            open_run(f"{run}@{stage}")
        with pytest.raises(RunError, match="must be one of"):
            prune_stage(run, stage)
    three["stages"] = three["stages"][2:]
    assert [found.state for found in survey(make_stages(three))] == ["finished"]
    assert train_stages(make_stages(three)) == [None]
    export_adapter(run, tmp_path / "adapter")  # whose card has no scores of what was pruned
    assert "validation" not in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    with pytest.raises(RunError, match=r"must keep a stage.*its only one"):
        prune_stage(run, "law")


def test_the_name_of_a_pruned_stage_is_free_again(three, tmp_path):
    """The same stage trained again is what it was, since its A is drawn by its name."""
    run, law = tmp_path / "run", stage_of(three, "law")
    end = open_run(run).state
    prune_stage(run, "law")
    with pytest.raises(RunError, match="got law for style"):
        train_stages(make_stages(three | {"stages": [three["stages"][0], law]}))
    train_stages(make_stages(three))
    assert open_run(run).state == end


def test_what_a_killed_prune_left_is_no_part_of_a_stage_of_that_name(three, tmp_path):
    run, end = tmp_path / "run", open_run(tmp_path / "run").state
    left = shutil.copytree(run / "stages/law", tmp_path / "left")
    prune_stage(run, "law")
    shutil.copytree(left, run / "stages/law")
    train_stages(make_stages(three), matrix=False)
    assert open_run(run).verify().state == end


def test_a_mix_that_the_rows_of_a_stage_have_chosen_goes_with_it(three, tmp_path, capsys):
    """And one by hand on top of it, which has its other strengths."""
    run = tmp_path / "run"
    mix_stages(run, {"style": 0.5}, reads=["facts", "style", "law"])
    mix_stages(run, {"facts": 0.5})
    assert cli(["prune", str(run), "law", "--yes"]) == 0
    assert capsys.readouterr().out.count("deleted mix-") == 2
    assert open_run(run).strengths == {"facts": 1, "style": 1}


def test_what_was_done_before_a_stage_was_pruned_is_not_done_again(two, tmp_path):
    """The same mix of the same stage, trained again, is that mix; heads that went are no steps."""
    run, style = tmp_path / "run", stage_of(two, "style")
    for _ in range(2):
        mix_stages(run, {"style": 0.5})
        assert open_run(run).strengths == {"facts": 1, "style": 0.5}
        undo(run)
        undo(run)
        redo(run)
        prune_stage(run, "style")
        heads = [open_run(run).state.digest]
        while open_run(run).history.past:
            heads.append(undo(run).state.digest)
        assert len(heads) == len(set(heads))
        undo(run, to="facts")
        train_stages(extension(run, style), matrix=False)


def test_a_config_goes_on_where_its_stages_are(two, tmp_path, capsys):
    """A stage that was undone is not below the next one: that is refused, with what to do."""
    run, law = tmp_path / "run", stage_of(two, "style") | {"name": "law"}
    two["stages"].append(law)
    undo(run)
    with pytest.raises(RunError, match=rf"without style. Run chainlora undo {run} --to style,"):
        make_plan(make_stages(two))
    undo(run, to="style")
    assert [each.state for each in survey(make_stages(two))] == ["finished", "finished", "new"]


def test_a_pruned_stage_of_pairs_leaves_a_whole_run(config, tmp_path):
    config["stages"][1] |= {"data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    train_stages(make_stages(config), matrix=False)
    prune_stage(tmp_path / "run", "style")
    assert open_run(tmp_path / "run").verify().stages == ["facts"]


def test_scores_of_pairs_are_scored_again_on_another_reference(config, tmp_path):
    """Where the stage that preferences began on is pruned, the state `base` has the same digest."""
    config["stages"][0] |= {"chain": {"ranks": [4], "steps": [8]}, "train": {"lr": 1e-2}}
    config["stages"][1] |= {"data": pair_files(tmp_path), "train": {"loss": "dpo", "lr": 1e-2}}
    run, path = tmp_path / "run", tmp_path / "run/matrix.jsonl"
    train_stages(make_stages(config))
    prune_stage(run, "facts")
    found = stage_matrix(run).grid
    assert found[0][0].value == 0.5  # of the base, which is its own reference now
    path.unlink()
    assert stage_matrix(run).grid == found


def test_a_stage_that_others_need_goes_after_them(config, tmp_path):
    config["stages"][1]["chain"] = {"ranks": [2], "steps": [1], "dora": True}
    train_stages(make_stages(config), matrix=False)
    before = files_of(tmp_path / "run")
    with pytest.raises(RunError, match="prune the later ones first"):
        prune_stage(tmp_path / "run", "facts")
    assert files_of(tmp_path / "run") == before
    prune_stage(tmp_path / "run", "style")


def test_a_fork_is_pruned_of_its_parents_stage(three, tmp_path):
    run, fork = tmp_path / "run", tmp_path / "fork"
    own = stage_of(three, "law") | {"name": "new", "output": str(fork)}
    train_stages(extension(f"{run}@style", own))
    before = files_of(run)
    prune_stage(fork, "facts")
    assert open_run(fork).stages == ["style", "new"]
    assert list(open_run(fork).kept()) == ["style", "new"]
    with pytest.raises(RunError, match="must be one of style, new"):
        prune_stage(fork, "facts")
    assert files_of(run) == before


def test_a_pruning_from_elsewhere_leaves_the_relative_name_of_the_base(
    config, tiny_folder, tmp_path, monkeypatch
):
    """So that a run that is moved together with its base still finds it."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    train_stages(make_stages(config | {"model": "base"}), matrix=False)
    monkeypatch.chdir("/")
    prune_stage(tmp_path / "run", "style")
    assert json.loads((tmp_path / "run/history.json").read_text())["base"]["model"] == "base"


LINKED = ("links", "rows", "stages", "stages/style", "stages/law")
LINKED_FILES = (".lock", "stages/style/metrics.jsonl", "chain.png")


@pytest.mark.parametrize("name", [*LINKED, *LINKED_FILES])
def test_a_received_run_changes_nothing_outside_itself(two, tmp_path, chainlora, name):
    """Every verb that changes a run refuses a symbolic link in it; `inspect` draws a picture, and
    follows none."""
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
        f"mix {run} style=0",
        f"extend {run} {tmp_path / 'law.yaml'}",
        f"train {config}",
    ):
        done = chainlora(words)
        assert done.status == 1
        assert f"a run must hold no symbolic links (got {run / name} ->" in done.err
    assert chainlora(f"inspect {run}").status == 0
    assert before == (sha256(outside) if outside.is_file() else sorted(outside.rglob("*")))


def test_what_cannot_be_pruned_is_refused_and_the_command_asks_first(three, tmp_path, capsys):
    run = tmp_path / "run"
    before = files_of(run)
    assert cli(["prune", str(run), "style"]) == 1
    shown = capsys.readouterr()
    assert "would delete" in shown.out
    assert "Nothing deleted. Add --yes." in shown.err
    assert cli(["prune", str(run), "nope", "--yes"]) == 1
    assert cli(["prune", f"{run}@style", "style", "--yes"]) == 2
    assert files_of(run) == before
    assert cli(["prune", str(run), "style", "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["again"] == [f"chainlora extend {run}@facts law.yaml --name law --output FOLDER"]
    assert not any(Path(path).exists() for path in found["files"])


# --- undo, redo ---


def test_undo_and_redo_go_through_what_was_done_and_delete_nothing(two, tmp_path):
    run = tmp_path / "run"
    mix_stages(run, {"style": 0.5})
    ends = [logits(run), logits(f"{run}@style"), logits(f"{run}@facts"), logits(f"{run}@base")]
    before = files_of(run)
    for end in ends[1:]:
        undo(run)
        assert torch.equal(
            logits(run, num_links=None) if end is not ends[-1] else logits(run, num_links=0), end
        )
    with pytest.raises(RunError, match="must be something to undo"):
        undo(run)
    for end in ends[-2::-1]:
        redo(run)
        assert torch.equal(logits(run), end)
    with pytest.raises(RunError, match="must be something to redo"):
        redo(run)
    after = files_of(run)
    assert [name for name in before if after[name] != before[name]] in ([], ["history.json"])
    undo(run)
    train_stages(extension(run, stage_of(two, "style") | {"name": "law"}), matrix=False)
    assert open_run(run).stages == ["facts", "style", "law"]
    with pytest.raises(RunError, match="must be something to redo"):
        redo(run)


def test_states_of_equal_digest_are_equal_to_the_bit(two, tmp_path):
    """By whatever way the run came there."""
    run = tmp_path / "run"
    mix_stages(run, {"style": 0})
    assert open_run(run).state.digest == open_run(f"{run}@facts").state.digest
    assert torch.equal(logits(run), logits(f"{run}@facts"))
    own = stage_of(two, "style") | {"output": str(tmp_path / "fork")}
    train_stages(extension(f"{run}@facts", own), matrix=False)
    fork, style = open_run(tmp_path / "fork"), open_run(f"{run}@style")
    assert fork.state == style.state
    assert torch.equal(logits(fork), logits(style))
    assert open_run(f"{run}@{style.state.digest[:8]}").entry == style.entry
