"""What is kept of a cell, and what is not taken for one: formats, digests, damage."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers import edit_json
from runs.test_files import files_up_to

from chainlora.errors import FileError, RunError
from chainlora_lab import read_results, report_experiment, run_cells
from chainlora_lab.results import check_alike


@pytest.fixture
def one(small):
    """An experiment of one cell."""
    return small(methods=["lora"], seeds=[0], tune={})


# --- what is recorded ---


def test_a_cell_says_what_computed_it(done):
    _, out, _ = done
    for cell in read_results(out).cells:
        assert re.fullmatch(r"[0-9a-f]{12}\+?", cell["commit"])
        assert cell["hardware"]["threads"] == torch.get_num_threads()
        assert {"python", "torch", "transformers", "peft", "chainlora"} <= cell["versions"].keys()
        assert re.fullmatch(r"\d+:[0-9a-f]{12}", cell["rows_digest"])
        assert re.fullmatch(r"\d+:[0-9a-f]{12}", cell["base_fingerprint"])


# --- formats and definitions ---


def test_cells_on_other_weights_are_told_from_weights_that_have_changed():
    """A quantised base was called one that had changed, and so were rows that are held out by the
    tokens of another tokenizer."""
    keys = {"task": "rows", "method": "lora", "seed": 0, "rows_digest": "2:a"}
    base = {"base_fingerprint": "2:a", "config": {"model": "m", "data": {"validation": 0.1}}}
    plain = keys | base
    check_alike([plain, plain])
    for field in ("base_fingerprint", "rows_digest"):
        with pytest.raises(RunError, match="have changed in between"):
            check_alike([plain, plain | {field: "2:b"}])
    config = plain["config"]
    quantized = {"config": config | {"quantize": "int8"}, "base_fingerprint": "2:b"}
    other = {"config": config | {"model": "n"}, "base_fingerprint": "2:c", "rows_digest": "2:b"}
    check_alike([plain, plain | quantized, plain | other])


def test_a_result_of_another_version_is_not_taken_for_one_of_this(one, tmp_path):
    run_cells(one, tmp_path, backend="inline")
    (path,) = tmp_path.glob("cells/*/result.json")
    edit_json(path, format=3)
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(RunError, match=r"must be of format 2 \(got 3 in "):
        run_cells(one, tmp_path, backend="inline")
    assert path.is_file()  # it is no damage: nothing is set aside


# --- damage ---


def test_a_torn_cell_is_computed_again_and_the_others_stay(done, tmp_path):
    experiment, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    path = sorted(tmp_path.glob("out/cells/*/result.json"))[0]
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "out" / "results.jsonl").unlink()  # which has the cell too
    outcome = run_cells(experiment, tmp_path / "out", backend="inline")
    assert (outcome.num_run, outcome.failed) == (1, {})
    scores = [
        [c["score"] for c in read_results(folder).cells] for folder in (out, tmp_path / "out")
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("key", ["tasks", "seeds", "primary"])
def test_a_head_by_which_pairs_are_miscounted_is_refused(done, tmp_path, key):
    """As in files that were joined by hand: a task that is there twice doubled its pairs."""
    first, *others = (done[1] / "results.jsonl").read_text().splitlines()
    head = json.loads(first)
    head[key] = ["lora", "chain3"] if key == "primary" else head[key] * 2
    (tmp_path / "results.jsonl").write_text("\n".join([json.dumps(head), *others]) + "\n")
    said = rf"must have what reports read \(.*{key}.*results.jsonl line 1"
    with pytest.raises(RunError, match=said):
        report_experiment(tmp_path)


@pytest.mark.parametrize("name", ["../../../x", "", "ABCDEFABCDEF", 7])
def test_a_cell_s_name_leads_nowhere_else(done, one, tmp_path, name):
    """``"cell": "../../../x"`` in a file to be reused wrote outside the output."""
    _, out, _ = done
    line = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    head = (out / "results.jsonl").read_text().splitlines()[0]
    path = tmp_path / "a" / "b" / "c" / "results.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(f"{head}\n{json.dumps(line | {'cell': name})}\n")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="a line of results must have what reports read"):
        run_cells(one, tmp_path / "out", backend="inline", reuse=[path])
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(RunError, match="a line of results must have what reports read"):
        run_cells(one, path.parent, backend="inline")
    assert not list(path.parent.glob("cells/*"))


@pytest.mark.parametrize("has_cells", [True, False])
def test_a_torn_last_line_is_left_out_with_a_word(done, tmp_path, caplog, has_cells):
    """Its cell is taken from its folder, or computed again; committed results have no folders."""
    experiment, out, _ = done
    if has_cells:
        shutil.copytree(out / "cells", tmp_path / "cells")
    whole = (out / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(whole[:-50])
    report_experiment(tmp_path, figures=False)
    assert "is torn and left out" in caplog.text
    assert run_cells(experiment, tmp_path, backend="inline").num_run == (0 if has_cells else 1)
    assert len(read_results(tmp_path).cells) == len(read_results(out).cells)
    (tmp_path / "results.jsonl").write_text(whole.replace("{", "", 1))
    with pytest.raises(RunError, match=r"line 1: .*remove the line"):
        report_experiment(tmp_path)


# --- a full disk ---


def test_an_experiment_on_a_full_disk_says_so_and_goes_on_later(one, tmp_path):
    with files_up_to(100), pytest.raises(FileError, match=r"must be written \(got File too large"):
        run_cells(one, tmp_path / "out", backend="inline")
    with files_up_to(2_000):  # enough for the plan, not for what a run writes
        outcome = run_cells(one, tmp_path / "out", backend="inline")
    (error,) = outcome.failed.values()
    assert "a file must be written (got " in error
    assert "unexpected" not in error
    assert run_cells(one, tmp_path / "out", backend="inline").failed == {}
