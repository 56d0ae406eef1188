"""`chainlora.diff`, held to dense arithmetic and to the answers of the models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny_folder, write_rows
from helpers import settings, train_all
from helpers_stages import begin

from chainlora import diff, extend, open_run
from chainlora.chain.link import stack_links


@pytest.fixture(scope="module")
def run(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run of stages a and b beside each other, b at two ranks, and their combination."""
    folder = tmp_path_factory.mktemp("difference")
    begin(tiny_folder, sentiment, folder / "run")
    rows = [{"prompt": f"say {n}:", "completion": " yes"} for n in range(12)]
    data = {"train": str(write_rows(folder / "b.jsonl", rows)), "validation": 4}
    other = {"name": "b", "data": data, "train": {"lr": 0.1}}
    extend(folder / "run", other | {"chain": {"ranks": [3], "steps": [8]}}, progress=False)
    return folder / "run"


def dense(address: str | Path) -> dict[str, np.ndarray]:
    """The update of each module of a state."""
    sums = stack_links(open_run(address).links())
    return {name: each.b.double().numpy() @ each.a.double().numpy() for name, each in sums.items()}


@pytest.mark.parametrize("names", ["a b", "a after-b", "base b"])
def test_the_difference_is_that_of_dense_updates(run, names):
    addresses = [f"{run}@{name}" for name in names.split()]
    found, (a, b) = diff(*addresses, prompts=0), map(dense, addresses)
    assert list(found["modules"]) == list(b)
    total = 0.0
    for name, row in found["modules"].items():
        other = a.get(name, np.zeros_like(b[name]))
        less = other - b[name]
        norms = [np.linalg.norm(each) for each in (other, b[name], less)]
        assert [row[key] for key in ("norm_a", "norm_b", "difference")] == pytest.approx(norms)
        assert row["relative"] == pytest.approx(norms[2] / max(norms[:2]))
        assert row["rank"] == np.linalg.matrix_rank(less, tol=1e-5 * norms[2])
        total += norms[2] ** 2
    assert found["total"]["difference"] == pytest.approx(total**0.5)
    assert found["answers"] == {}


def test_equal_states_differ_in_nothing(run):
    found = diff(run, f"{run}@after-b")
    assert found["total"] | {"norm_a": 0, "norm_b": 0} == dict.fromkeys(found["total"], 0)
    assert [row["differ"] for row in found["answers"].values()] == [[], []]


def test_the_command_line(run, sentiment, chainlora):
    words = ("diff", f"{run}@base", f"{run}@b")
    found = chainlora(*words, "--prompts", "4", "--json").json
    answers = found["answers"]
    assert {name: row["asked"] for name, row in answers.items()} == {"b": 4}
    (differing, *_) = answers["b"]["differ"]
    assert set(differing) == {"prompt", "expected", "a", "b"}
    shown = chainlora(*words, "--prompts", "4").out
    assert f"{len(answers['b']['differ'])} of 4 answers differ; right: a" in shown
    assert f"the weights differ by {found['total']['relative']:.1%}" in shown
    whole = chainlora(*words, "--prompts", "4", "--weights").out
    for name, row in found["modules"].items():
        assert name not in shown
        assert f"{row['relative']:.1%}" in whole[whole.index(name) :].splitlines()[0]
    rows = str(sentiment / "validation.jsonl")  # of the task of stage a
    whole = chainlora("diff", f"{run}@a", f"{run}@b", "--data", rows, "--json").json["answers"][""]
    scores = chainlora("eval", f"{run}@a", "--data", rows, "--json").json
    assert whole["asked"] == scores["rows"]
    assert whole["right_a"] == round(scores["metrics"]["accuracy"] * scores["rows"])


def test_two_runs_and_their_bases(run, sentiment, tmp_path, chainlora):
    copy = shutil.copytree(run, tmp_path / "copy")
    found = diff(f"{run}@a", f"{copy}@b", prompts=1)
    assert found["modules"] == diff(f"{run}@a", f"{run}@b", prompts=0)["modules"]
    assert {name: row["asked"] for name, row in found["answers"].items()} == {"a": 1, "b": 1}
    other = make_tiny_folder(tmp_path / "other-base", num_hidden_layers=1)
    tree = settings(other, sentiment, tmp_path / "other", chain={"ranks": [2], "steps": [1]})
    train_all(tree)
    chainlora("diff", run, tmp_path / "other").refused("must have the same base", "other-base")
    shutil.rmtree(other)
    addresses = [f"{tmp_path / 'other'}@{name}" for name in ("base", "main")]
    assert diff(*addresses, prompts=0)["total"]["rank"] == 2  # without its base


def test_answers_longer_than_32_tokens_are_not_cut_and_cut_ones_not_called_wrong(run, tmp_path):
    rows = [{"prompt": "say 1:", "completion": " yes" * 40}]
    data = write_rows(tmp_path / "long.jsonl", rows)
    ((whole,), (cut,)) = (
        diff(f"{run}@b", f"{run}@base", data=data, max_new_tokens=most)["answers"].values()
        for most in (None, 8)
    )
    assert (whole["right_a"], whole["right_b"]) == (0, 0)
    assert len(whole["differ"][0]["b"]) > 3 * len(cut["differ"][0]["b"])  # of 80 tokens, and of 8
    assert (cut["right_a"], cut["right_b"]) == (None, None)
