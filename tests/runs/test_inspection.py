"""What inspection says of a run, held to dense arithmetic on every module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import entry_of, records_of, settings, stage_dir, stop_after
from helpers_export import dense_adapter
from safetensors.numpy import load_file

from chainlora import inspect_run, train
from chainlora.errors import RunError
from chainlora.runs.records import read_records


@pytest.fixture(scope="module")
def run(tiny_folder, sentiment, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("inspected") / "run"
    chain = {"ranks": [4, 2], "steps": [12, 5], "alpha": [8, 3]}
    chain["target_modules"] = ["q_proj", "v_proj", "up_proj"]
    train(settings(tiny_folder, sentiment, output, chain=chain))
    return output


def dense(run: Path, link: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """ΔW by module and all A, float64, from the files alone."""
    folder = run / "links" / entry_of(run)["tied"][link]
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = [tensors[name].astype(np.float64) for name in sorted(tensors) if "lora_A" in name]
    return {name: delta.numpy() for name, delta in dense_adapter(folder).items()}, factors


def norm(deltas: list[np.ndarray]) -> float:
    return sum(float((delta**2).sum()) for delta in deltas) ** 0.5


def effective_rank(delta: np.ndarray) -> float:
    """exp(entropy of σ/Σσ) (Roy & Vetterli 2007)."""
    values = np.linalg.svd(delta, compute_uv=False)
    shares = values[values > 1e-12 * values[0]] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(delta: np.ndarray) -> float:
    return float((delta**2).sum() / np.linalg.norm(delta, 2) ** 2)


def overlap(a: np.ndarray, other: np.ndarray) -> float:
    """Mean squared cosine of the principal angles between the row spaces."""
    one, two = np.linalg.qr(a.T)[0], np.linalg.qr(other.T)[0]
    cosines = np.linalg.svd(one.T @ two, compute_uv=False)
    return float((cosines**2).sum()) / min(len(a), len(other))


def test_the_numbers_of_each_link_are_those_of_dense_arithmetic(run):
    found = inspect_run(run)
    rows = [(row["link"], row["rank"], row["steps"], row["scaling"]) for row in found["links"]]
    assert rows == [(0, 4, 12, 2.0), (1, 2, 5, 1.5)]
    # float64 on both sides, but there the scaling is folded into float32 factors: a relative
    # rounding of 6e-8 each
    for row in found["links"]:
        deltas = list(dense(run, row["link"])[0].values())
        assert row["delta_norm"] == pytest.approx(norm(deltas), rel=1e-7)
        ranks = np.mean(list(map(effective_rank, deltas))), np.mean(list(map(stable_rank, deltas)))
        assert row["effective_rank"] == pytest.approx(ranks[0], rel=1e-6)
        assert row["stable_rank"] == pytest.approx(ranks[1], rel=1e-7)
        assert 1 <= row["stable_rank"] <= row["effective_rank"] <= row["rank"]
    (first, a), (second, b) = dense(run, 0), dense(run, 1)
    assert found["links"][0]["overlap"] == []
    mean_overlap = np.mean([overlap(*pair) for pair in zip(b, a, strict=True)])
    assert found["links"][1]["overlap"] == pytest.approx([mean_overlap], rel=1e-7)
    total = [first[name] + second[name] for name in first]
    assert found["chain"]["delta_norm"] == pytest.approx(norm(total), rel=1e-7)
    rank = np.mean(list(map(effective_rank, total)))
    assert found["chain"]["effective_rank"] == pytest.approx(rank, rel=1e-6)
    assert (found["chain"]["links"], found["chain"]["rank"]) == (2, 6)


def test_loss_and_score_are_those_of_the_records(run):
    records = records_of(run)
    rows = inspect_run(run)["links"]
    for row in rows:
        losses = [r["loss"] for r in records if r["event"] == "step" and r["link"] == row["link"]]
        assert len(losses) == row["steps"]
        assert row["loss"] == losses[-1]  # the last tenth of 12 and of 5 steps is one step
        knot = [r for r in records if r["event"] == "eval" and r["where"] == "knot"][row["link"]]
        assert row["scores"] == {"accuracy": knot["accuracy"], "loss": knot["loss"]}


def test_a_killed_run_can_be_inspected(run, configure, tmp_path):
    """Half a last line is what SIGKILL leaves of a record."""
    killed = tmp_path / "run"
    stop_after(configure(), 6)
    metrics = stage_dir(killed) / "metrics.jsonl"
    whole, before = metrics.read_text(), inspect_run(killed)["links"]
    metrics.write_text(whole + '{"event": "step", "st')
    assert read_records(metrics) == [json.loads(line) for line in whole.splitlines()]
    assert inspect_run(killed)["links"] == before
    assert [row["link"] for row in before] == [0]
    for there in (killed, Path(shutil.copytree(run, tmp_path / "finished"))):
        metrics = stage_dir(there) / "metrics.jsonl"
        whole = metrics.read_text()
        metrics.write_text("oh\n" + whole)
        with pytest.raises(RunError, match=r"metrics.jsonl must be as the run wrote it"):
            inspect_run(there)
        for line in ("oh\n", "[]\n", "{}\n"):  # and where no checksum says so
            metrics.write_text(line + whole)
            with pytest.raises(RunError, match=r"JSON object a line \(got .*; remove the broken"):
                read_records(metrics)


def test_no_links_and_an_untrained_link_have_no_size(configure, tmp_path):
    keys = {"target_modules": ["q_proj"]}
    train(configure("none", chain=keys | {"ranks": [], "steps": []}))
    found = inspect_run(tmp_path / "none")
    assert (found["links"], found["chain"]) == ([], {"links": 0, "rank": 0})
    train(configure(chain=keys | {"ranks": [2], "steps": [1]}, train={"warmup_steps": 1}))
    row = inspect_run(tmp_path / "run")["links"][0]
    assert (row["delta_norm"], row["effective_rank"], row["stable_rank"]) == (0.0, 0.0, 0.0)


def test_a_narrow_terminal_cuts_no_number(chainlora, run, monkeypatch):
    wide = chainlora("inspect", run).out
    for name, value in {"COLUMNS": "40", "FORCE_COLOR": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    narrow = chainlora("inspect", run).out
    assert "…" not in narrow
    assert all(word in narrow for word in wide.split() if "." in word and word[0].isdigit())
