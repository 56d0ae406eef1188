"""`--max-forgetting`: a stage that makes earlier rows worse is taken back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import write_rows
from helpers_data import rows_of
from helpers_export import save_lora
from helpers_stages import section

from chainlora import add, extend, open_run, redo, stage_matrix, train
from chainlora.errors import ConfigError, ForgettingError, RunError
from chainlora.evaluation.forgetting import loss_of
from chainlora.evaluation.stage_scores import Cell

HARSH = {"chain": {"ranks": [4], "steps": [6]}, "train": {"lr": 0.1}}


@pytest.fixture
def run(tiny_folder, tmp_path) -> Path:
    """A run of one stage on plain rows, with rows for its base."""
    general = rows_of(tmp_path / "general.jsonl", 8)
    tree = {"model": str(tiny_folder), "output": str(tmp_path / "run")}
    tree |= {"start_data": {"train": general, "validation": general}, "train": {"lr": 1e-2}}
    data = {"train": rows_of(tmp_path / "a.jsonl", 0), "validation": 3}
    stage = {"name": "a", "data": data, "chain": {"ranks": [2], "steps": [6]}}
    train(tree | {"stages": [stage]}, progress=False)
    return tmp_path / "run"


def harsh(folder: Path) -> Path:
    """Write a stage whose rows have other answers to other prompts, learned far too fast."""
    rows = [{"prompt": f"say {n}", "completion": " no no no"} for n in range(12)]
    data = {"train": str(write_rows(folder / "b.jsonl", rows))}
    (folder / "b.yaml").write_text(json.dumps({"name": "b", "beside": False, "data": data} | HARSH))
    return folder / "b.yaml"


def test_a_stage_that_forgets_is_taken_back_and_named(run, tmp_path, chainlora):
    words = ("extend", run, harsh(tmp_path), "--max-forgetting")
    said = chainlora(*words, "0.02")
    assert said.status == 3
    error = said.err.splitlines()[-1]
    assert said.out == ""
    assert error.startswith("chainlora: error: b instead of a forgets more")
    before, after = (stage_matrix(f"{run}@{key}").grid[-1] for key in "ab")
    for old, new in zip(before, after, strict=False):
        rise = math.expm1(new.value - old.value)
        assert rise > 0.02
        text = f"loss of {old.stage} rose from {old.value:.4f} to {new.value:.4f}, perplexity by"
        assert f"{text} {rise:.1%}" in error
    assert open_run(run).key == "a"
    again = chainlora(*words, "0.02")  # nothing is left to train; the answer is the same
    assert (again.status, again.err.splitlines()[-1]) == (3, error)
    held = chainlora(*words, "1e9")
    assert held.status == 0
    assert "no column of base, a lost more than 1e+09" in held.err
    assert open_run(run).key == "a"  # a command that was given before moves nothing
    assert redo(run).key == "b"
    # after a kill between training and the comparison
    assert chainlora(*words, "0.02").status == 3
    assert open_run(run).key == "a"


def test_a_combination_goes_back_as_a_whole_and_an_adapter_too(run, tiny_folder, tmp_path, capsys):
    more = {"name": "c", "data": {"train": rows_of(tmp_path / "c.jsonl", 4)}} | {"train": {"lr": 1}}
    with pytest.raises(ForgettingError, match=r"after-c instead of a .*redo"):
        extend(run, more | {"chain": {"ranks": [4], "steps": [6]}}, max_forgetting=0)
    assert (open_run(run).key, redo(run).key) == ("a", "after-c")
    save_lora(tmp_path / "x", tiny_folder)
    rows = rows_of(tmp_path / "x.jsonl", 6)
    with pytest.raises(ForgettingError, match="after-x instead of after-c"):
        add(run, tmp_path / "x", rows, max_forgetting=0, progress=False)
    assert open_run(run).key == "after-c"
    capsys.readouterr()
    harmless = more | {"name": "d", "train": {"lr": 1e-6}}
    extend(run, harmless, max_forgetting=10.0)
    held = "no column of base, a, c lost more than 10 by after-d instead of after-c"
    assert held in capsys.readouterr().err
    assert open_run(run).key == "after-d"


def test_a_stage_is_compared_with_the_state_that_it_was_added_to(run, tmp_path, chainlora):
    """Not with a later state, of another stage, that the run was in between."""
    words = {}
    for name, start in (("c", 4), ("d", 6)):
        rows = rows_of(tmp_path / f"{name}.jsonl", start)
        keys = "--train.lr 1 --chain.steps [6] --chain.ranks [4] --max-forgetting"
        words[name] = ["extend", run, rows, *keys.split()]
    assert chainlora(*words["c"], "0").status == 3
    assert chainlora(*words["d"], "1e9").status == 0
    assert chainlora("undo", run, "--to", "after-c").status == 0
    said = chainlora(*words["c"], "1e9")
    assert said.status == 0
    assert "no column of base, a lost more than 1e+09 by after-c instead of a" in said.err


def test_what_cannot_be_compared_is_refused_before_training(run, sentiment, tmp_path, chainlora):
    stage = harsh(tmp_path)
    for limit in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="must be 0 or more"):
            extend(run, stage, max_forgetting=limit)
    extend(run, section(sentiment, "d"), progress=False)
    bare = {"name": "a", "data": {"train": str(tmp_path / "a.jsonl"), "keep_rows": False}}
    tree = {"model": open_run(run).base.model, "output": str(tmp_path / "bare")}
    tree |= {"stages": [bare | HARSH], "start_data": "none"}
    train(tree, progress=False)
    with pytest.raises(RunError, match=r"compares scores of rows .*none in .*bare"):
        extend(tmp_path / "bare", stage, max_forgetting=1.0, progress=False)
    assert [path.name for path in (tmp_path / "bare/stages").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("metric", "before", "after", "loss"),
    [
        ("accuracy", 0.9, 0.8, 0.1),
        ("em", 0.5, 0.75, -0.25),
        ("loss", 2.0, 2.0 + math.log(1.5), 0.5),
        ("perplexity", 4.0, 5.0, 0.25),
    ],
)
def test_the_loss_of_a_column(metric, before, after, loss):
    cells = [Cell("", "a", "", "train", metric, value, 0.0, 1, 1) for value in (before, after)]
    assert loss_of(*cells) == pytest.approx(loss)


def test_a_score_may_fall_by_exactly_the_limit():
    """0.9 - 0.88 is more than 0.02 in floating point, and the stage was taken back."""
    for right in range(2, 101):
        before, after = (
            Cell("", "a", "", "validation", "accuracy", n / 100, 0.0, 100, 100)
            for n in (right, right - 2)
        )
        assert 0.0199 < loss_of(before, after) <= 0.02
