"""Rehearsal: how many rows of each stage, what it is trained like, and where it comes by itself."""

from __future__ import annotations

import pytest
from conftest import write_rows
from helpers import Stop, stopping, train_all, train_on
from helpers_data import pair_files

from beside.cases import add, config_of, section
from chainlora import evaluate_task, extend
from chainlora.cli.main import run as cli
from chainlora.config.staging import Stage, make_stages
from chainlora.errors import DataError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import redo, undo
from chainlora.training import rehearsing
from chainlora.training.plan import make_plan
from chainlora.training.rehearsing import with_steps
from chainlora.training.stages import extension, rehearsal, train_stages


def test_a_rehearsal_reads_as_many_rows_of_each_stage(abc, capsys, monkeypatch):
    assert cli(["rehearse", f"{abc}", "--dry-run"]) == 0
    assert capsys.readouterr().out == "rehearsal: would train links of rank 2 on kept rows\n"
    (stage,) = rehearsal(abc, {})
    kept = open_run(abc).kept().values()

    def steps(stage: Stage) -> tuple[int, ...] | None:
        return with_steps(stage.config, kept).chain.steps

    assert (stage.name, stage.config.chain.ranks) == ("rehearsal", (2,))
    assert steps(stage) == (9,)  # 12, 12 and 12 training rows, each twice, 8 at once
    assert stage.config.train.lr == pytest.approx(0.3 * open_run(f"{abc}@c").config().train.lr)
    monkeypatch.setattr(rehearsing, "ROWS", 16)  # where stages keep more
    assert steps(stage) == (6,)
    monkeypatch.undo()
    (stage,) = rehearsal(abc, {"train": {"batch_size": 24, "lr": 1e-4}})
    assert (steps(stage), stage.config.train.lr) == ((3,), 1e-4)
    short = {"chain": {"steps": [2]}}
    (result,) = train_stages(rehearsal(abc, short), matrix=False)
    assert result is not None
    # 8 of each in an epoch
    assert (result["rows"], result["data"]["train"]["weights"]) == (36, [8 / 12] * 3)
    assert open_run(abc).entry.is_rehearsal
    assert train_stages(rehearsal(abc, short), matrix=False) == [None]  # nothing is left to do
    assert stage_matrix(abc, compute=False).stages == ["a", "b", "c"]  # it has no rows of its own
    assert undo(abc).entry.kind == "combine"
    assert redo(abc).stage == "rehearsal"


def test_after_a_rehearsal_rows_are_those_of_the_last_stage(abc, sentiment, tmp_path):
    def seen(name: str) -> tuple[str, str, str]:
        own, other = evaluate_task(abc), evaluate_task(abc, data=sentiment / "train.jsonl")
        assert (own["stage"], own["rows"]) == ("c", 4)
        assert cli(["export", f"{abc}", "--to", "gguf", "--output", f"{tmp_path / name}"]) == 0
        return own["task"], other["task"], (tmp_path / name / "Modelfile").read_text()

    before = seen("combined")
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}}), matrix=False)
    assert seen("rehearsed") == before  # and so no chat template around prompts


def test_a_stopped_rehearsal_of_another_state_stays_as_it_is(abc):
    with pytest.raises(Stop):
        train_stages(rehearsal(abc, {}), listener=stopping())
    assert [stage.name for stage in rehearsal(abc, {})] == ["rehearsal"]
    undo(abc, "a")
    assert [stage.name for stage in rehearsal(abc, {})] == ["rehearsal-2"]


def test_a_stage_after_a_rehearsal_has_the_config_of_a_stage(abc, sentiment):
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}, "train": {"lr": 1e-5}}), matrix=False)
    (stage,) = extension(abc, section(sentiment, "d"))
    assert (stage.config.train.lr, stage.config.data.rehearse) == (1e-2, False)
    assert stage.after == "rehearsal"
    add(sentiment, abc, "d")
    state = open_run(abc)
    assert state.entry.parents == ("a", "b", "c", "d")  # without the rehearsal
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}}), matrix=False)
    assert open_run(abc).stage == "rehearsal-2"


def test_a_stage_that_is_combined_after_a_later_one_is_rehearsed(ac, sentiment):
    train_on(f"{ac}@start", section(sentiment, "d"))  # then a kill
    add(sentiment, ac, "b")
    extend(ac, section(sentiment, "d"), rehearse=True, progress=False)
    assert open_run(ac).entry.is_rehearsal
    assert [*open_run(ac).shares] == ["a", "c", "d", "b", "rehearsal"]  # as they ended


def test_a_rehearsal_takes_no_loss_of_pairs(abc, tmp_path, caplog):
    """What it learns by is that of the rows, also after a stage on preferences."""
    pairs = {"data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    pairs |= {"name": "pairs", "chain": {"ranks": [2], "steps": [1]}}
    train_on(abc, pairs)
    (stage,) = rehearsal(abc, {}, [("chain.epochs", [1])])
    assert (stage.config.train.loss, stage.config.chain.steps) == (None, None)
    (result,) = train_stages([*rehearsal(abc, {"chain": {"steps": [1]}})], matrix=False)
    assert len(result["data"]["train"]["weights"]) == 3
    assert "pairs" in caplog.text
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " film"}\n')
    plain = {"name": "plain", "data": {"train": str(rows)}, "chain": pairs["chain"]}
    with pytest.raises(DataError, match=r"set train\.loss: null"):  # dpo is inherited
        train_on(abc, plain)
    train_on(abc, plain | {"train": {"loss": None}})


def test_a_rehearsal_asked_for_before_the_last_stage_is_named(
    tiny_folder, sentiment, tmp_path, caplog
):
    """It was left out without a word."""
    more = [section(sentiment, "b") | {"rehearse": True}, section(sentiment, "c")]
    make_plan(make_stages(config_of(tiny_folder, sentiment, tmp_path / "run", *more)))
    assert "stage b: `rehearse` is ignored, as stages beside it follow; set it in c" in caplog.text


def test_general_rows_are_rehearsed_as_one_more_stage(tiny_folder, sentiment, tmp_path):
    general = [{"prompt": f"say {n}", "completion": " yes"} for n in range(8)]
    rows = str(write_rows(tmp_path / "general.jsonl", general))
    tree = config_of(tiny_folder, sentiment, tmp_path / "run", section(sentiment, "b"))
    train_all(tree | {"start_data": {"train": rows}})
    (stage,) = rehearsal(tmp_path / "run", {})
    kept = open_run(tmp_path / "run").kept().values()
    assert with_steps(stage.config, kept).chain.steps == (8,)  # 12, 12 and 8 rows twice, 8 at once
    short = rehearsal(tmp_path / "run", {"chain": {"steps": [2]}})
    (result,) = train_stages(short, matrix=False)
    assert result["rows"] == 32
    assert len(result["data"]["train"]["weights"]) == 3
